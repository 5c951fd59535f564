"""Stop requests: SIGTERM and SIGUSR1, which schedulers send before they take a node away, and Ctrl-C."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from voxtral_dist.output.console import say_at_once


@dataclass
class StopRequest:
    """Whether a signal asked this process to stop after the current step."""

    requested: bool = False

    def set(self, _signal: int, _frame: FrameType | None) -> None:
        """Handle a signal."""
        self.requested = True


def _interrupted(request: StopRequest, at_second: Any) -> Callable[[int, FrameType | None], None]:
    """A handler of Ctrl-C; `at_second` handles the next one."""

    def handle(_signal: int, _frame: FrameType | None) -> None:
        request.requested = True
        signal.signal(signal.SIGINT, at_second)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            say_at_once("Stopping: the state is saved after this step. Ctrl-C again leaves without that.")

    return handle


_open: StopRequest | None = None


@contextmanager
def stop_signals(*, ends_process: bool = False) -> Iterator[StopRequest]:
    """Turn SIGTERM, SIGUSR1 and Ctrl-C (SIGINT) into a stop request while the context is open.

    Commands open it before anything that takes time, so that no signal is lost while libraries are imported and a model
    is loaded. A context inside of another one has its request.

    Args:
        ends_process: whether a second Ctrl-C ends the process at once, whatever it waits for. Otherwise it does what
            Ctrl-C did before: in a notebook, it must not end the kernel.
    """
    global _open
    if _open is not None:
        yield _open
        return
    request = StopRequest()
    before = {number: signal.signal(number, request.set) for number in (signal.SIGTERM, signal.SIGUSR1)}
    before[signal.SIGINT] = signal.getsignal(signal.SIGINT)
    at_second = signal.SIG_DFL if ends_process else before[signal.SIGINT]
    signal.signal(signal.SIGINT, _interrupted(request, at_second))
    _open = request
    try:
        yield request
    finally:
        _open = None
        for number, handler in before.items():
            signal.signal(number, handler)
