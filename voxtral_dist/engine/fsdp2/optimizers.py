"""The optimizer of sharded parameters: torch's fused AdamW, or our own with fewer bytes per parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from voxtral_dist.config import OptimizerConfig
from voxtral_dist.engine.fsdp2.low_memory_adamw import LowMemoryAdamW, quantized_names
from voxtral_dist.engine.optim import parameter_groups


def build_optimizer(
    config: OptimizerConfig, model: nn.Module, trained: Mapping[str, nn.Parameter], seed: int
) -> torch.optim.AdamW | LowMemoryAdamW:
    """Build the optimizer of a sharded model.

    Args:
        config: section `optimizer` of the configuration.
        model: the sharded model with its weights.
        trained: its trained parameters by name.
        seed: of the rounding of weights in bfloat16.
    """
    groups = parameter_groups(model, config)
    if config.algorithm == "adamw" and config.master_weights:
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=True)
    quantized = quantized_names(model) if config.algorithm == "adamw_8bit" else set()
    return LowMemoryAdamW(groups, {one: name for name, one in trained.items()}, quantized, config, seed)


def update(optimizer: torch.optim.AdamW | LowMemoryAdamW, gradients: Sequence[Tensor], factor: float) -> None:
    """Update the weights with all gradients multiplied by a factor.

    Args:
        optimizer: from `build_optimizer`.
        gradients: of all parameters, which torch's optimizer wants multiplied in place.
        factor: such as that of clipping.
    """
    if isinstance(optimizer, LowMemoryAdamW):
        optimizer.step(factor)
        return
    if factor != 1.0:
        for gradient in gradients:
            gradient.mul_(factor)
    optimizer.step()
