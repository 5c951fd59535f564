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
            forget_peak()
        self._restart()

    def answer(self) -> dict[str, Any]:
        """All measurements."""
        return {
            "losses": self.losses,
            "seconds": self.seconds,
            "core_seconds": self.core_seconds,
            "peak_host_bytes": status_bytes("VmHWM"),
            **self._device_peaks(),
        }

    def _restart(self) -> None:
        self._started, self._started_cores = time.perf_counter(), time.process_time()

    def _device_peaks(self) -> dict[str, int]:
        if self.device.type != "cuda":
            return {}
        return {
            "peak_device_bytes": torch.cuda.max_memory_allocated(self.device),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(self.device),
        }
