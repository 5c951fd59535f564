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


_open: StopRequest | None = None


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGUSR1 into a stop request while the context is open.

    Commands open it before anything that takes time, so that no signal is lost while libraries are imported and a model
    is loaded. A context inside of another one has its request.
    """
    global _open
    if _open is not None:
        yield _open
        return
    request = StopRequest()
    before = {number: signal.signal(number, request.set) for number in (signal.SIGTERM, signal.SIGUSR1)}
    _open = request
    try:
        yield request
    finally:
        _open = None
        for number, handler in before.items():
            signal.signal(number, handler)
