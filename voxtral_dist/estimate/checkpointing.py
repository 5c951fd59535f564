"""`model.activation_checkpointing: auto`: as little recomputation as fits into a GPU, by the estimate of `plan`."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch

from voxtral_dist.config import ActivationCheckpointingConfig, RunConfig
from voxtral_dist.distributed.collectives import max_over_ranks
from voxtral_dist.distributed.world import World, ranks_on_node
from voxtral_dist.estimate.activations import MicroBatchShape
from voxtral_dist.estimate.estimator import Estimator, Machine
from voxtral_dist.estimate.quantities import gigabytes
from voxtral_dist.estimate.sharding import Sharding, configured_sharding
from voxtral_dist.estimate.workload import largest_workload
from voxtral_dist.model.flops import BatchShape

# Of a GPU's memory: the rest is for fragmentation, and for what libraries allocate in their kernels.
USABLE_FRACTION = 0.9
# Every n-th block is recomputed: none, a quarter, a third, half, all.
_CHOICES = tuple(
    ActivationCheckpointingConfig(encoder=a, language_model=b) for a, b in product((0, 4, 3, 2, 1), repeat=2)
)


@dataclass(frozen=True)
class ChosenCheckpointing:
    """What `auto` has become.

    device_bytes: the peak of a forward or backward pass on the rank that has most. usable_bytes: of the smallest GPU;
    None where its memory is not known, or ranks are processes on CPUs: then nothing is recomputed.
    """

    checkpointing: ActivationCheckpointingConfig
    device_bytes: float | None = None
    usable_bytes: float | None = None

    @property
    def line(self) -> str:
        """The choice and its reason."""
        every = self.checkpointing
        parts = [
            f"every {_ordinal(number)}block of the {name}"
            for name, number in (("encoder", every.encoder), ("language model", every.language_model))
            if number
        ]
        chosen = f"activation_checkpointing: auto recomputes {' and '.join(parts) or 'no activations'}"
        if self.device_bytes is None or self.usable_bytes is None:
            return f"{chosen}, because the memory of GPUs is not known"
        needed, usable = gigabytes(self.device_bytes), gigabytes(self.usable_bytes)
        fit = "of" if self.device_bytes <= self.usable_bytes else "more than"
        return f"{chosen}: forward and backward pass need {needed} {fit} {usable}"


_UNKNOWN = ChosenCheckpointing(ActivationCheckpointingConfig())


def with_chosen_checkpointing(config: RunConfig, world: World) -> tuple[RunConfig, ChosenCheckpointing | None]:
    """A configuration in which `auto` is replaced, and the choice; all ranks call it together and agree.

    The smallest GPU of all ranks decides, so that a run recomputes the same everywhere. On other GPUs it may resume
    with another choice, which changes no result.
    """
    if config.model.activation_checkpointing != "auto":
        return config, None
    return checkpointing_for(config, machine_of(world))


def machine_of(world: World) -> Machine:
    """The machine of these ranks, with the memory of the smallest GPU; all ranks call it together and agree."""
    memory = None
    if world.device.type == "cuda":
        total = torch.cuda.get_device_properties(world.device).total_memory
        memory = -max_over_ranks([-total], world)[0]
    return Machine(
        num_gpus=world.size,
        gpus_per_node=ranks_on_node(world.size),
        device="gpu" if world.device.type == "cuda" else "cpu",
        gpu_memory=memory,
    )


def checkpointing_for(config: RunConfig, machine: Machine) -> tuple[RunConfig, ChosenCheckpointing | None]:
    """Replace `auto` as `with_chosen_checkpointing` does, for a machine that is described."""
    if config.model.activation_checkpointing != "auto":
        return config, None
    if _gpu_memory(machine) is None:
        return _with(config, _UNKNOWN.checkpointing), _UNKNOWN
    sharding = configured_sharding(config.engine, machine.num_gpus)
    estimator, chosen = estimator_with_chosen_checkpointing(Estimator(config, machine, largest_workload), sharding)
    return estimator.config, chosen


def estimator_with_chosen_checkpointing(
    estimator: Estimator, sharding: Sharding
) -> tuple[Estimator, ChosenCheckpointing | None]:
    """Replace `auto` in the configuration of an estimator, for its machine and model."""
    config, memory = estimator.config, _gpu_memory(estimator.machine)
    if config.model.activation_checkpointing != "auto":
        return estimator, None
    chosen = _UNKNOWN
    if memory is not None:
        largest = estimator.with_workload(config, largest_workload(config, estimator.window_sizes))
        chosen = choose_checkpointing(largest, sharding, memory)
    return estimator.with_config(_with(config, chosen.checkpointing)), chosen


def choose_checkpointing(estimator: Estimator, sharding: Sharding, gpu_memory: int) -> ChosenCheckpointing:
    """The choice with the fewest recomputed FLOPs whose forward and backward pass fit; all blocks if none does.

    Phases without activations, such as the update, are the same for all choices. It is a function of the configuration
    and of this memory alone: the micro-batch is the largest that the budgets allow, whatever shards hold.
    """
    (shape,) = estimator.workload.candidates
    usable = USABLE_FRACTION * gpu_memory
    variants = {choice: estimator.with_config(_with(estimator.config, choice)) for choice in _CHOICES}
    found = ChosenCheckpointing(_CHOICES[0])
    for choice in sorted(_CHOICES, key=lambda one: _computed_flops(variants[one], shape)):
        found = ChosenCheckpointing(choice, _training_bytes(variants[choice], sharding, shape), usable)
        if found.device_bytes is not None and found.device_bytes <= usable:
            break
    return found


def _gpu_memory(machine: Machine) -> int | None:
    return machine.gpu_memory if machine.device == "gpu" else None


def _training_bytes(estimator: Estimator, sharding: Sharding, shape: MicroBatchShape) -> float:
    phases = estimator.estimate(sharding, shape).phases
    return max(phase.device_bytes for phase in phases if phase.device.get("activations"))


def _computed_flops(estimator: Estimator, shape: MicroBatchShape) -> float:
    computed = BatchShape.computed(shape.num_windows, shape.num_examples, shape.num_positions, shape.num_target_tokens)
    return estimator.flops.hardware(computed)


def _with(config: RunConfig, checkpointing: ActivationCheckpointingConfig) -> RunConfig:
    model = config.model.model_copy(update={"activation_checkpointing": checkpointing})
    return config.model_copy(update={"model": model})


def _ordinal(number: int) -> str:
    return {1: "", 2: "2nd ", 3: "3rd "}.get(number, f"{number}th ")
