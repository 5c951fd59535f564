"""Commands that end with the process that runs them, however it ends.

A guard runs each command: this file as a program, in a session of its own, so that no signal to the demo reaches it. It
watches a pipe whose other end only the demo holds. When the demo ends, killed or not, the system closes that end, and
the guard ends the command with all processes that it has started: they are one process group.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

# For a run to finish its step and save, before it is killed.
GRACE_SECONDS = 30.0
_POLL_SECONDS = 0.1
# Of <linux/prctl.h>: a signal to this process when its parent ends.
_PR_SET_PDEATHSIG = 1


def end_with_make() -> None:
    """End this process without a traceback on SIGINT and SIGTERM, and where make is killed that has started it."""
    signal.signal(signal.SIGINT, _exit)
    signal.signal(signal.SIGTERM, _exit)
    if "MAKELEVEL" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def run_leashed(command: Sequence[str], stdout: int | None = None) -> tuple[int, str]:
    """Run a command that is ended when this process ends.

    Args:
        command: the program and its arguments.
        stdout: `subprocess.PIPE`, or None for that of this process.

    Returns:
        Its exit code, 128 plus the number of the signal that killed it, and what it printed to the pipe.
    """
    guarded = [sys.executable, "-S", __file__, str(GRACE_SECONDS), *command]
    # Where the block ends by an exception, its pipe is closed, and the guard is waited for.
    with subprocess.Popen(guarded, stdin=subprocess.PIPE, stdout=stdout, text=True, start_new_session=True) as guard:
        printed = "" if guard.stdout is None else guard.stdout.read()
        return guard.wait(), printed


def _exit(number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _guard(grace_seconds: float, command: Sequence[str]) -> int:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
    while process.poll() is None:
        if select.select([sys.stdin], [], [], _POLL_SECONDS)[0]:
            deadline = time.monotonic() + grace_seconds
            _signal_group(process.pid, signal.SIGTERM)
            while _signal_group(process.pid, 0) and time.monotonic() < deadline:
                process.poll()
                time.sleep(_POLL_SECONDS)
            break
    # What the command has started and left behind.
    _signal_group(process.pid, signal.SIGKILL)
    code = process.wait()
    return code if code >= 0 else 128 - code


def _signal_group(group: int, number: int) -> bool:
    """Whether any process of the group was there."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(_guard(float(sys.argv[1]), sys.argv[2:]))
