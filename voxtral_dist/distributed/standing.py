"""Where this process stands in its run: said by the main thread, read by the watchdog's.

Parts of a run have paces of their own, so each has its own limit, which follows from what was measured in this process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

T = TypeVar("T")

# data: waiting for data workers. end: the export.
Phase = Literal["start", "data", "step", "save", "evaluation", "end"]

# A part may take this much longer than the longest one so far.
_FACTOR = 5.0
# Until a part was measured it may take this much longer than the floor: compilation, first reads, plans of kernels.
_UNMEASURED_FACTOR = 6.0
# Parts that must have ended before they count as measured.
_NUM_MEASURED: dict[Phase, int] = {"data": 3, "step": 3, "save": 1, "evaluation": 1, "end": 1}


@dataclass(frozen=True)
class Place:
    """The place of a process in its run.

    phase: what it does. step: number of updates before. slot: of the step. keys: of the utterances. since: by the
    clock of `Standing`.
    """

    phase: Phase
    since: float
    step: int | None = None
    slot: int | None = None
    keys: tuple[str, ...] = ()


@dataclass
class Standing:
    """The newest place of a process, and the longest time between two places of each phase."""

    clock: Callable[[], float] = time.monotonic
    place: Place = field(init=False)
    _longest: dict[Phase, float] = field(default_factory=dict)
    _num_ended: dict[Phase, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.place = Place("start", self.clock())

    def stand(self, phase: Phase, step: int | None = None, slot: int | None = None, keys: Sequence[str] = ()) -> None:
        """Say that the process has come to a new place."""
        now, last = self.clock(), self.place
        self._longest[last.phase] = max(self._longest.get(last.phase, 0.0), now - last.since)
        if phase != last.phase:
            self._num_ended[last.phase] = self._num_ended.get(last.phase, 0) + 1
        self.place = Place(phase, now, step, slot, tuple(keys))

    def advance(self, keys: Sequence[str] = ()) -> None:
        """Say that the process makes progress in the same phase and step."""
        self.stand(self.place.phase, self.place.step, self.place.slot, keys)

    def excuse(self, seconds: float) -> None:
        """Do not count some seconds since the last place, in which the process was stopped."""
        last = self.place
        self.place = Place(last.phase, last.since + seconds, last.step, last.slot, last.keys)

    def age(self) -> float:
        """Seconds since the process has come to its place."""
        return self.clock() - self.place.since

    def limit(self, floor: float) -> float:
        """How many seconds the process may stay at its place; before the first step without a limit."""
        phase = self.place.phase
        if phase == "start":
            return math.inf
        if self._num_ended.get(phase, 0) < _NUM_MEASURED[phase]:
            return _UNMEASURED_FACTOR * floor
        return max(floor, _FACTOR * self._longest[phase])


# Of this process.
_here = Standing()


def here() -> Standing:
    """The standing of this process."""
    return _here


def stand(phase: Phase, step: int | None = None, slot: int | None = None, keys: Sequence[str] = ()) -> None:
    """Say that this process has come to a new place; see `Standing`."""
    _here.stand(phase, step, slot, keys)


def advance(keys: Sequence[str] = ()) -> None:
    """Say that this process makes progress at its place; see `Standing`."""
    _here.advance(keys)


def data_waits(steps: Iterable[T], first_step: int) -> Iterator[T]:
    """The micro-batches of each step, before each of which this process stands in the phase `data`."""
    iterator = iter(steps)
    step = first_step
    while True:
        stand("data", step)
        try:
            batches = next(iterator)
        except StopIteration:
            return
        stand("step", step)
        yield batches
        step += 1


def advancing(items: Iterable[T]) -> Iterator[T]:
    """Yield the items; each of them is progress."""
    for item in items:
        advance()
        yield item
