"""Wall time, core seconds and memory of training steps, measured alike for every trainer."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from workloads.peak_memory import forget_peak, status_bytes


@dataclass
class StepMeter:
    """The steps of one rank: `start` before the first, `step_ends` after each, data included.

    device: on a GPU its queue is waited for, and its peak is that of its own memory.
    """

    device: torch.device
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    core_seconds: list[float] = field(default_factory=list)

    def start(self) -> None:
        """Start the clock: everything is loaded and the first batch is about to be requested."""
        self._before = self._peaks()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._restart()

    def step_ends(self) -> None:
        """Record the end of an update. The first step is a warm-up, in which libraries allocate their buffers."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds.append(time.perf_counter() - self._started)
        self.core_seconds.append(time.process_time() - self._started_cores)
        if len(self.seconds) == 1:
            self._before["peak_host_bytes"] = status_bytes("VmHWM")
            forget_peak()
        self._restart()

    def answer(self) -> dict[str, Any]:
        """All measurements: peaks of the steps, and those of the whole process, which has loaded a model before."""
        peaks = self._peaks()
        return {
            "losses": self.losses,
            "seconds": self.seconds,
            "core_seconds": self.core_seconds,
            **peaks,
            "whole_process": {name: max(size, self._before[name]) for name, size in peaks.items()},
        }

    def _restart(self) -> None:
        self._started, self._started_cores = time.perf_counter(), time.process_time()

    def _peaks(self) -> dict[str, int]:
        peaks = {"peak_host_bytes": status_bytes("VmHWM")}
        if self.device.type == "cuda":
            peaks |= {
                "peak_device_bytes": torch.cuda.max_memory_allocated(self.device),
                "peak_reserved_bytes": torch.cuda.max_memory_reserved(self.device),
                "peak_pinned_bytes": torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0),
            }
        return peaks
