"""Steps, floating point operations and time of a run, from formulas (`voxtral_dist.model.flops`)."""

from __future__ import annotations

from dataclasses import dataclass

from voxtral_dist.config import RunConfig
from voxtral_dist.estimate.workload import Workload
from voxtral_dist.model.flops import TrainingFlops


@dataclass(frozen=True)
class Costs:
    """What a run computes.

    model_flops: that the mathematics of all steps needs, without padding and recomputation; what a utilisation (MFU) is
    a share of. hardware_flops: that devices compute. idle: share of the ranks' time that a step with `slots_per_step`
    micro-batches leaves unused, where ranks do not divide them. seconds: of all steps, without evaluations and saves.
    """

    num_steps: int
    micro_batches_per_rank: int
    model_flops: float
    hardware_flops: float
    idle: float
    mfu: float
    peak_tflops: float
    seconds: float


def run_costs(
    config: RunConfig, flops: TrainingFlops, workload: Workload, num_ranks: int, mfu: float, peak_tflops: float
) -> Costs:
    """Costs of a run on so many ranks, each with `peak_tflops` of which training uses the share `mfu`."""
    slots = config.train_data.slots_per_step
    per_rank = -(-slots // num_ranks)
    micro_batches = config.num_steps * slots / workload.num_averaged
    model = flops.model(workload.needed) * micro_batches
    idle = 1 - slots / (per_rank * num_ranks)
    return Costs(
        num_steps=config.num_steps,
        micro_batches_per_rank=per_rank,
        model_flops=model,
        hardware_flops=flops.hardware(workload.computed) * micro_batches,
        idle=idle,
        mfu=mfu,
        peak_tflops=peak_tflops,
        seconds=model / (num_ranks * peak_tflops * 1e12 * mfu * (1 - idle)),
    )
