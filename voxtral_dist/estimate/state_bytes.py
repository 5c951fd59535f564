"""Bytes of a trained value's weight, gradient and moments, by optimizer and engine."""

from __future__ import annotations

from dataclasses import dataclass, replace

from voxtral_dist.config import OptimizerConfig
from voxtral_dist.engine.fsdp2.block_states import BLOCK_SIZE
from voxtral_dist.engine.fsdp2.low_memory_adamw import quantized_names
from voxtral_dist.estimate.sharding import Fsdp2Sharding, Sharding
from voxtral_dist.model.trainable import is_adapter
from voxtral_dist.model.voxtral import TrainedVoxtral

_FLOAT32_BYTES, _BFLOAT16_BYTES = 4, 2
# Two moments of 8 bits, and two float32 scales of a block.
_QUANTIZED_BYTES = 2 + 2 * _FLOAT32_BYTES / BLOCK_SIZE


@dataclass(frozen=True)
class StateBytes:
    """Bytes of a trained value, mean over all: its weight as the optimizer keeps it, its gradient, and its moments.

    The average of `optimizer.ema_decay` lies where the moments do, and counts as one.
    """

    weight: float = _FLOAT32_BYTES
    gradient: float = _FLOAT32_BYTES
    moments: float = 2 * _FLOAT32_BYTES


def state_bytes(model: TrainedVoxtral, optimizer: OptimizerConfig, sharding: Sharding) -> StateBytes:
    """The bytes of a configuration. Under ZeRO, which refuses what needs fewer, those of `adamw` or `muon`."""
    found = _without_average(model, optimizer, sharding)
    return found if optimizer.ema_decay is None else replace(found, moments=found.moments + _FLOAT32_BYTES)


def _without_average(model: TrainedVoxtral, optimizer: OptimizerConfig, sharding: Sharding) -> StateBytes:
    if optimizer.algorithm == "muon":
        return StateBytes(moments=_FLOAT32_BYTES)
    if not isinstance(sharding, Fsdp2Sharding):
        return StateBytes()
    sizes: dict[str, int] = {name: one.numel() for name, one in model.named_parameters() if one.requires_grad}
    quantized = quantized_names(model) if optimizer.algorithm == "adamw_8bit" else set()
    # Adapters keep float32.
    in_bfloat16 = set() if optimizer.master_weights else {name for name in sizes if not is_adapter(name)}

    def mean(few: set[str], few_bytes: float, other_bytes: float) -> float:
        total: float = sum(size * (few_bytes if name in few else other_bytes) for name, size in sizes.items())
        return total / sum(sizes.values())

    weight = mean(in_bfloat16, _BFLOAT16_BYTES, _FLOAT32_BYTES)
    return StateBytes(weight, weight, mean(quantized, _QUANTIZED_BYTES, 2 * _FLOAT32_BYTES))


def checkpoint_bytes(model: TrainedVoxtral, optimizer: OptimizerConfig, sharding: Sharding) -> float:
    """Bytes of a checkpoint: weights and moments of the trained parameters, and their averages, as they are kept."""
    trained: int = sum(one.numel() for one in model.parameters() if one.requires_grad)
    states = state_bytes(model, optimizer, sharding)
    return trained * (states.weight + states.moments)
