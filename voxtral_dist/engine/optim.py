"""What is decayed and how fast each step learns: one definition for all engines."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from voxtral_dist.config import Component, OptimizerConfig
from voxtral_dist.model.trainable import component_of

# In each group: its learning rate over that of the configuration.
_FACTOR = "learning_rate_factor"


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The trained parameters by weight decay and learning rate, in the form that torch's optimizers take.

    Matrices and kernels decay; norms, biases and embeddings don't.
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
    """Give each group its part of the rate of a step, see `learning_rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group[_FACTOR]


def scale_learning_rate(group: dict[str, Any], factor: float) -> None:
    """Give a group of `parameter_groups` another rate; what decays of its weights in a step stays the same."""
    group[_FACTOR] *= factor
    group["weight_decay"] /= factor


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
