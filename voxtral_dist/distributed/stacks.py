"""What the threads of this process do, as text: for runs that hang."""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import Literal, NamedTuple

_NATIVE_SECONDS = 20.0
# From Linux's prctl.h: who may attach to this process.
_PR_SET_PTRACER = 0x59616D61
_OWN_THREADS = ("watchdog", "failure-watch", "store-watch", "launcher-watch", "patient-sum")

Doing = Literal["data", "collective", "other"]
_WAITS_FOR_DATA = ("torch/utils/data/dataloader.py",)
_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/", "voxtral_dist/distributed/collectives.py")
# Where the main thread waits for the one that writes a checkpoint, and that one for those of other ranks.
_WAITS_FOR_THREAD = ("voxtral_dist/checkpoints/save_under_way.py",)
_WAITS_OF_THREAD = ("voxtral_dist/checkpoints/written_parts.py",)
# Where ZeRO-3 waits for what it has begun, which no frame of torch's shows, and a decorator around that.
_WAITS_OF_ZERO, _DECORATOR_OF_ZERO = "deepspeed/runtime/zero/partition", "deepspeed/utils/nvtx.py"


class Activity(NamedTuple):
    """What a process does: `data` if it waits for its data workers, and the function that says so."""

    doing: Doing
    function: str


def activity() -> Activity:
    """What this process does, by the frames of its threads.

    The autograd engine runs hooks with collectives in threads of its own. A collective of NCCL that a GPU waits for is
    in no frame.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sys._current_frames()
    others = [frame for ident, frame in frames.items() if ident != main and names.get(ident) not in _OWN_THREADS]
    own = [frames[main]] if main in frames else []
    kinds: list[tuple[Doing, tuple[str, ...], list[FrameType]]] = [
        ("data", _WAITS_FOR_DATA, own),
        ("collective", _COLLECTIVES, [*own, *others]),
    ]
    if own and _outermost(own[0], _WAITS_FOR_THREAD) is not None:
        kinds.append(("collective", _WAITS_OF_THREAD, others))
    for doing, files, stacks in kinds:
        for frame in stacks:
            found = _outermost(frame, files)
            if found is None and doing == "collective":
                found = _wait_of_zero(frame)
            if found is not None:
                return Activity(doing, _named(found))
    return Activity("other", _named(own[0]) if own else "an unknown function")


def _outermost(frame: FrameType | None, files: tuple[str, ...]) -> FrameType | None:
    """The frame by which a stack enters one of these files, but for decorators; None if it does not."""
    found = None
    while frame is not None:
        code = frame.f_code
        if any(part in code.co_filename for part in files) and code.co_name != "wrapper":
            found = frame
        frame = frame.f_back
    return found


def _wait_of_zero(frame: FrameType | None) -> FrameType | None:
    """The innermost frame of a stack, but for decorators, if ZeRO-3 waits for other ranks there; None if it does not.

    Further inside it may also wait for a drive.
    """
    while frame is not None and _DECORATOR_OF_ZERO in frame.f_code.co_filename:
        frame = frame.f_back
    return frame if frame is not None and _WAITS_OF_ZERO in frame.f_code.co_filename else None


def _named(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    return f"{frame.f_code.co_name} ({'/'.join(path.parts[-3:])}:{frame.f_lineno})"


def write_python_stacks(file: TextIOWrapper) -> None:
    """Write the Python stacks of all threads, and the states of data workers."""
    file.flush()
    faulthandler.dump_traceback(file, all_threads=True)
    for child in multiprocessing.active_children():
        file.write(f"\nData worker {child.name}: {process_state(child.pid or 0)}\n")
    file.flush()


def write_native_stacks(file: TextIOWrapper) -> None:
    """Write the stacks of all threads with frames of C, where py-spy is there."""
    native = native_stacks(os.getpid())
    if native is not None:
        file.write(f"\nNative stacks by py-spy:\n{native}\n")


def process_state(process: int) -> str:
    """What the system says about a process of this host, such as `State: T (stopped)`."""
    with suppress(OSError):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        state = next((line.replace("\t", " ") for line in lines if line.startswith("State:")), "State: unknown")
        waits = ""
        with suppress(OSError):
            waits = Path(f"/proc/{process}/wchan").read_text().strip("0")
        return f"process {process}, {state}{f', waits in {waits}' if waits else ''}"
    return f"process {process} is gone"


def native_stacks(process: int) -> str | None:
    """The stacks of a process of this host with frames of C, or why there are none; None without py-spy."""
    program = shutil.which("py-spy")
    if program is None:
        return None
    if process == os.getpid():
        # Otherwise Yama refuses a child that attaches to its parent.
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)
    command = [program, "dump", "--native", "--pid", str(process)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_NATIVE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    return ended.stdout or ended.stderr
