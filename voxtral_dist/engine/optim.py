"""Parameter groups and the learning rate schedule, shared by all engines."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from voxtral_dist.config import Component, OptimizerConfig
from voxtral_dist.model.trainable import component_of

# Key of a group: the ratio of its learning rate to `optimizer.learning_rate`.
_FACTOR = "learning_rate_factor"


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The trained parameters grouped by weight decay and learning rate, as torch's optimizers take them.

    Weight decay applies to matrices and kernels, not to norms, biases and embeddings.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[tuple[Component | None, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = component_of(name) if component_of(name) in config.component_learning_rates else None
            is_plain = _num_dimensions(parameter) < 2 or id(parameter) in embeddings
            groups.setdefault((own, 0.0 if is_plain else config.weight_decay), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": decay,
            _FACTOR: config.component_learning_rates[own] / config.learning_rate if own else 1.0,
        }
        for (own, decay), parameters in groups.items()
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set each group's learning rate for a step, from the rate that `learning_rate` returns."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group[_FACTOR]


def scale_learning_rate(group: dict[str, Any], factor: float) -> None:
    """Multiply the learning rate of a group of `parameter_groups`; the decay of its weights per step stays the same."""
    group[_FACTOR] *= factor
    group["weight_decay"] /= factor


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """The learning rate of the update with index `step` of `num_steps`; a pure function, without state to save.

    It rises linearly over `warmup_steps`, then falls along a cosine (Loshchilov and Hutter, arXiv 1608.03983) or a
    line, or stays constant.
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
    # ZeRO-3 empties parameters and keeps their shape in `ds_shape`.
    return len(getattr(parameter, "ds_shape", parameter.shape))
