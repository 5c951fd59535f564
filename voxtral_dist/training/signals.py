"""Stop requests: SIGTERM and SIGUSR1, which schedulers send before they take a node away."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class StopRequest:
    """Whether a signal asked this process to stop after the current step."""

    requested: bool = False

    def set(self, _signal: int, _frame: FrameType | None) -> None:
        """Handle a signal."""
        self.requested = True


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGUSR1 into a stop request while the context is open."""
    request = StopRequest()
    before = {number: signal.signal(number, request.set) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
