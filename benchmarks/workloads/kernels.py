"""The kernels that a training step spends the most time in, by torch's profiler."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

NUM_KERNELS = 20


def costliest_kernels(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Profile one step: its seconds, those of all kernels, and the costliest kernels with calls and seconds.

    On CPUs, operations take the place of kernels. Only the device is observed, because observing the host too would
    slow down a step that the host may bound.
    """
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        started = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
    rows = [
        {"name": event.key, "calls": event.count, "seconds": 1e-6 * _microseconds(event, on_gpu)}
        for event in profiled.key_averages()
        if event.device_type == (DeviceType.CUDA if on_gpu else DeviceType.CPU)
    ]
    rows.sort(key=lambda row: -row["seconds"])
    return {
        "step_seconds": seconds,
        "kernel_seconds": sum(row["seconds"] for row in rows),
        "num_kernels": sum(row["calls"] for row in rows),
        "costliest": rows[:NUM_KERNELS],
    }


def _microseconds(event: Any, on_gpu: bool) -> float:
    return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)
