"""The memory that a step adds to its process, at its peak, and the fresh process that it is measured in.

It is the kernel's high-water mark of resident memory, which is reset before the step. The `ru_maxrss` of `getrusage`
cannot be reset, and begins with what the parent process had.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

# Every larger block is mapped on its own and returned when it is freed: else it would stay in the heap, and be counted.
MMAP_THRESHOLD_BYTES = 65_536


def in_fresh_process(measure: Callable[..., dict[str, Any]], *arguments: object) -> dict[str, Any]:
    """Call a function of a benchmark's module in a fresh process and return its value.

    Raises:
        BrokenProcessPool: it was killed, as by a lack of memory.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(MMAP_THRESHOLD_BYTES)
    try:
        with ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        ) as one:
            return one.submit(measure, *arguments).result()
    finally:
        # Other processes that are started later are timed, and would ask the system for memory all the time.
        del os.environ["MALLOC_MMAP_THRESHOLD_"]


def added_peak(step: Callable[[], float], warm_up: Callable[[], float]) -> dict[str, Any]:
    """Bytes that a step adds to its process, its core seconds, and its return value.

    The warm-up is a small step, after which gradients and the libraries' own buffers are there.
    """
    warm_up()
    gc.collect()
    forget_peak()
    before, started = status_bytes("VmRSS"), time.process_time()
    value = step()
    return {
        "added_peak_bytes": status_bytes("VmHWM") - before,
        "core_seconds": time.process_time() - started,
        "value": value,
    }


def forget_peak() -> None:
    """Set the high-water mark of this process to its present size, as documented in proc(5)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def status_bytes(name: str) -> int:
    """A size of this process in the kernel's `/proc/self/status`: `VmRSS` now, `VmHWM` at its peak."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return int(lines[name].split()[0]) * 1024
