"""Slow ranks: all others wait for them in every step, so the time of a step does not tell which they are.

Each rank therefore measures what does not depend on others: a fixed computation on its device, a fixed loop on its CPU,
and its own waits for data.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from voxtral_dist.distributed.collectives import first_over_ranks, max_over_ranks
from voxtral_dist.distributed.world import World
from voxtral_dist.output.counting import counted
from voxtral_dist.training.metrics_log import MetricsLog

_EVERY_STEPS = 50
# A rank is slow that takes this many times as long as the median, at so many checks in a row.
_FACTOR, _NUM_CHECKS = 1.5, 3
# Waits for data count as slow above this part of the time.
_LEAST_WAITING = 0.05
_NUM_TRIES = 5
_DEVICE_SIZE, _DEVICE_PRODUCTS, _CPU_SIZE, _LOOP = 2048, 20, 256, 20_000


@dataclass(frozen=True)
class _Measure:
    """Something that each rank measures; `what` names it in a sentence."""

    key: str
    what: str


_MEASURES = (
    _Measure("device", "its device computes"),
    _Measure("cpu", "its CPU computes"),
    _Measure("data", "it waits for data"),
)


class Stragglers:
    """Names ranks that are slower than the others. All ranks call its methods together."""

    def __init__(
        self,
        metrics_log: MetricsLog,
        world: World,
        host: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Measure nothing yet; `host` is the name of this rank's."""
        self._metrics_log = metrics_log
        self._world = world
        self._host = host
        self._clock = clock
        self._began = clock()
        self._waiting_seconds = 0.0
        self._slow_checks: dict[tuple[str, int], int] = {}
        self._matrices: list[torch.Tensor] | None = None

    def after_step(self, step: int, waiting_seconds: float) -> None:
        """Count a step of this rank, and compare all ranks after every 50.

        Args:
            step: the number of updates so far, the same on all ranks.
            waiting_seconds: time that this rank has waited for its data.
        """
        self._waiting_seconds += waiting_seconds
        if self._world.size == 1 or step % _EVERY_STEPS:
            return
        own = [_fastest(self._compute), _fastest(_loop), self._waiting_seconds]
        elapsed = self._clock() - self._began
        self._began, self._waiting_seconds = self._clock(), 0.0
        values = self._of_all_ranks(own)
        found = [self._judged(measure, values[number::3], elapsed) for number, measure in enumerate(_MEASURES)]
        rows = {measure.key: row for measure, (row, _) in zip(_MEASURES, found, strict=True)}
        self._metrics_log.write("event", step, {"event": "ranks", **rows})
        for rank, sentence in [slow for _, slow in found if slow is not None]:
            host = first_over_ranks(self._host if rank == self._world.rank else None, self._world)
            sentence = sentence.format(host)
            self._metrics_log.say(f"step {step}: {sentence}")
            self._metrics_log.write("event", step, {"event": "straggler", "rank": rank, "sentence": sentence})

    def _of_all_ranks(self, own: Sequence[float]) -> list[float]:
        """The values of all ranks, in microseconds on the way: each fills in its own."""
        filled = [0] * (len(own) * self._world.size)
        first = len(own) * self._world.rank
        filled[first : first + len(own)] = [round(1e6 * value) for value in own]
        return [value / 1e6 for value in max_over_ranks(filled, self._world)]

    def _judged(
        self, measure: _Measure, values: Sequence[float], elapsed: float
    ) -> tuple[dict[str, Any], tuple[int, str] | None]:
        """The row of a measure, and the rank that is slow by it for as long as that is said, with the sentence."""
        median, slowest = statistics.median(values), max(values)
        rank = values.index(slowest)
        row = {"median_seconds": round(median, 6), "slowest_seconds": round(slowest, 6), "slowest_rank": rank}
        is_slow = slowest > _FACTOR * median
        if measure.key == "data":
            is_slow = is_slow and slowest > _LEAST_WAITING * elapsed
        count = self._slow_checks.get((measure.key, rank), 0) + 1 if is_slow else 0
        self._slow_checks = {key: value for key, value in self._slow_checks.items() if key[0] != measure.key}
        self._slow_checks[measure.key, rank] = count
        if count != _NUM_CHECKS:
            return row, None
        times = f"{slowest / median:.1f} times" if median > 0 else "much more than"
        sentence = (
            f"Rank {rank} on {{}} is slow: {measure.what} for {times} the median of all {counted(len(values), 'rank')} "
            f"({slowest:.4g} s against {median:.4g} s), and all others wait for it."
        )
        return row, (rank, sentence)

    @torch.no_grad()
    def _compute(self) -> None:
        device = self._world.device
        is_gpu = device.type != "cpu"
        if self._matrices is None:
            size, dtype = (_DEVICE_SIZE, torch.bfloat16) if is_gpu else (_CPU_SIZE, torch.float32)
            self._matrices = [torch.ones(size, size, dtype=dtype, device=device) for _ in range(2)]
        first, second = self._matrices
        for _ in range(_DEVICE_PRODUCTS if is_gpu else 1):
            torch.mm(first, first, out=second)
        if is_gpu:
            torch.accelerator.synchronize(device)


def _loop() -> None:
    total = 0
    for number in range(_LOOP):
        total += number


def _fastest(function: Callable[[], None]) -> float:
    """The shortest of a few durations in seconds: what interrupts a computation makes it longer."""
    durations = []
    for _ in range(_NUM_TRIES):
        started = time.perf_counter()
        function()
        durations.append(time.perf_counter() - started)
    return min(durations)
