"""What is decayed and how fast each step learns: one definition for all engines."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from voxtral_dist.config import OptimizerConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups of the trainable parameters: matrices and kernels decay; norms, biases and embeddings don't."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_plain = _num_dimensions(parameter) < 2 or id(parameter) in embeddings
            (plain if is_plain else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """The rate of the update with index `step` of `num_steps`: a pure function, so it has no state to save.

    Linear from 0 over `warmup_steps`, then along the cosine of Loshchilov and Hutter (arXiv 1608.03983), a line, or
    constant.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, num_steps - 1 - config.warmup_steps)
    floor = config.final_learning_rate_fraction
    match config.schedule:
        case "constant":
            return config.learning_rate
        case "linear":
            return config.learning_rate * (1.0 - (1.0 - floor) * progress)
        case "cosine":
            return config.learning_rate * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)))


def _num_dimensions(parameter: nn.Parameter) -> int:
    # ZeRO-3 may have emptied the parameter already: then its shape is kept beside it.
    return len(getattr(parameter, "ds_shape", parameter.shape))
