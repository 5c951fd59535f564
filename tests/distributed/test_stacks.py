"""What a process does is told by its frames. Libraries' are made here: functions with the names of their files."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from voxtral_dist.distributed.stacks import activity

SITE = "/lib/python3.11/site-packages"


def calling(name: str, file: str) -> Callable[..., Any]:
    """A function in a file that calls what it gets."""
    functions: dict[str, Any] = {}
    exec(compile(f"def {name}(call, *arguments):\n    return call(*arguments)", file, "exec"), functions)
    function: Callable[..., Any] = functions[name]
    return function


def doing(*functions: Callable[..., Any]) -> str:
    """What a process does whose other thread waits in the last of these functions, which the others call."""
    first, *rest = functions
    lock = threading.Lock()
    lock.acquire()
    thread = threading.Thread(target=first, args=(*rest, lock.acquire))
    thread.start()
    try:
        while not is_in(thread, functions[-1]):
            time.sleep(0.001)
        found = activity()
    finally:
        lock.release()
        thread.join()
    return f"{found.doing}: {found.function.rpartition(':')[0]}"


def is_in(thread: threading.Thread, function: Callable[..., Any]) -> bool:
    """Whether the innermost frame of a thread is a function's."""
    frame = sys._current_frames().get(thread.ident or 0)
    return frame is not None and frame.f_code is function.__code__


def test_a_wait_of_zero_for_what_it_has_begun_is_one_for_other_ranks() -> None:
    fetch = calling("fetch", f"{SITE}/deepspeed/runtime/zero/partitioned_param_coordinator.py")
    wait = calling("wait", f"{SITE}/deepspeed/runtime/zero/partition_parameters.py")
    decorator = calling("wrapped_fn", f"{SITE}/deepspeed/utils/nvtx.py")
    drive = calling("synchronize_reads", f"{SITE}/deepspeed/runtime/swap_tensor/partitioned_param_swapper.py")
    assert (
        doing(decorator, fetch, decorator, wait, decorator) == "collective: wait (runtime/zero/partition_parameters.py"
    )
    assert doing(fetch, wait, drive).startswith("other: ")


def test_a_save_waits_for_other_ranks_if_its_thread_does() -> None:
    gather = calling("gather", "/src/voxtral_dist/checkpoints/written_parts.py")
    wait = calling("wait", "/src/voxtral_dist/checkpoints/save_under_way.py")
    assert wait(doing, gather) == "collective: gather (voxtral_dist/checkpoints/written_parts.py"
    assert doing(gather).startswith("other: "), "the main thread is elsewhere"
    assert wait(doing, calling("write", "/src/voxtral_dist/checkpoints/files.py")).startswith("other: ")
