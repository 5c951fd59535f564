"""The time limit of a run: it ends, with its state saved, before `max_run_hours` are over."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

Part = Literal["step", "save", "upload", "evaluation"]

# Expected durations are the longest of the last ones, and this much longer.
_NUM_REMEMBERED = 20
_MARGIN = 1.25


class TimeLimit:
    """The hours that a process may run, and the measured durations of what it still has to do in them.

    Ranks have clocks of their own: each asks for a stop by its own, and all stop where one does.
    """

    def __init__(self, max_hours: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """Start the time; None sets no limit."""
        self.max_hours = max_hours
        self._clock = clock
        self._started = clock()
        self._durations: dict[Part, deque[float]] = {}

    def record(self, part: Part, seconds: float) -> None:
        """Remember how long a part took."""
        self._durations.setdefault(part, deque(maxlen=_NUM_REMEMBERED)).append(seconds)

    @contextmanager
    def measuring(self, part: Part) -> Iterator[None]:
        """Remember how long the context takes."""
        started = self._clock()
        yield
        self.record(part, self._clock() - started)

    def last(self, part: Part) -> float:
        """How long a part took the last time."""
        return self._durations[part][-1]

    def remember(
        self,
        checkpoints: Sequence[dict[str, Any]],
        evaluations: Sequence[dict[str, Any]],
        uploads: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Take the durations from rows of `metrics.jsonl` that earlier processes of the run wrote."""
        for row in checkpoints:
            if "seconds" in row:
                self.record("save", row["seconds"])
        for row in uploads:
            self.record("upload", row["seconds"])
        steps: dict[int, float] = {}
        for row in evaluations:
            steps[row["step"]] = steps.get(row["step"], 0.0) + row.get("seconds", 0.0)
        for seconds in steps.values():
            self.record("evaluation", seconds)

    def is_too_short_for(self, *parts: Part) -> bool:
        """Whether the time is expected to end before all of these parts have, in turn."""
        return self._seconds_left() < sum(map(self._expected, parts))

    def needs_a_save(self) -> bool:
        """Whether a save is needed to learn how long one takes: none was measured in half of the time."""
        return "save" not in self._durations and self._seconds_left() <= 1800 * (self.max_hours or 0.0)

    def _seconds_left(self) -> float:
        if self.max_hours is None:
            return float("inf")
        return self._started + 3600 * self.max_hours - self._clock()

    def _expected(self, part: Part) -> float:
        return _MARGIN * max(self._durations.get(part, ()), default=0.0)
