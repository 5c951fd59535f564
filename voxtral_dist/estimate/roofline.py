"""Time of kernels by a roofline (Williams et al., Communications of the ACM 52(4), 2009), and what bounds them.

A kernel takes the longest of: its FLOPs at the rate that a GPU sustains for kernels of its kind, its bytes at the
bandwidth that the GPU sustains, and the least time of a kernel. Their sum is the time of a GPU that never waits:
neither for its host, nor for data, nor for other ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from voxtral_dist.estimate.gpus import Gpu
from voxtral_dist.estimate.kernels import Kernel, Phase

Bound = Literal["products", "attention", "memory traffic", "launches"]


@dataclass(frozen=True)
class KernelTime:
    """Kernels of a micro-batch: their number, and their seconds, also by phase and by what bounds each of them."""

    num_kernels: int
    seconds: float
    by_phase: dict[Phase, float]
    by_bound: dict[Bound, float]

    @property
    def bound(self) -> Bound:
        """What bounds most of the time."""
        return max(self.by_bound, key=lambda bound: self.by_bound[bound])


class Roofline:
    """The roofline of one GPU at one precision."""

    def __init__(self, gpu: Gpu, precision: str) -> None:
        peak = gpu.peak_flops(precision)
        self._rates = {
            "product": peak * gpu.products,
            "float8 product": (gpu.float8_peak_flops or peak) * gpu.products,
            "attention": peak * gpu.attention,
            "attention backward": peak * gpu.attention_backward,
        }
        self._bandwidth = gpu.bandwidth * gpu.sustained_bandwidth
        self._launch_seconds = gpu.launch_seconds

    def traffic_seconds(self, num_bytes: float) -> float:
        """Seconds for moving so many bytes."""
        return num_bytes / self._bandwidth

    def time(self, kernels: Iterable[Kernel]) -> KernelTime:
        """The time of some kernels, one after the other."""
        number = 0
        by_phase: Counter[Phase] = Counter()
        by_bound: Counter[Bound] = Counter()
        for kernel in kernels:
            seconds, bound = self.kernel(kernel)
            number += kernel.count
            by_phase[kernel.phase] += seconds * kernel.count  # type: ignore[assignment]
            by_bound[bound] += seconds * kernel.count  # type: ignore[assignment]
        return KernelTime(number, sum(by_phase.values()), dict(by_phase), dict(by_bound))

    def kernel(self, kernel: Kernel) -> tuple[float, Bound]:
        """Seconds of one kernel, and what bounds it."""
        computes: Bound = "products" if "product" in kernel.kind else "attention"
        rate = self._rates.get(kernel.kind)
        times: list[tuple[float, Bound]] = [
            (kernel.flops / rate if rate else 0.0, computes),
            (self.traffic_seconds(kernel.num_bytes), "memory traffic"),
            (self._launch_seconds, "launches"),
        ]
        return max(times)
