"""The optimizer that DeepSpeed wraps: fused AdamW, DeepSpeed's AdamW for offload to the CPU, or Muon."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import nn

from voxtral_dist.config import OptimizerConfig
from voxtral_dist.engine.optim import parameter_groups, scale_learning_rate
from voxtral_dist.engine.zero.settings import offload_device
from voxtral_dist.engine.zero.states import full_shape
from voxtral_dist.model.blocks import blocks_of
from voxtral_dist.model.voxtral import TrainedVoxtral


def build_optimizer(config: OptimizerConfig, model: TrainedVoxtral, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """Build the optimizer of the trained parameters, which may already be sharded.

    Args:
        config: section `optimizer` of the configuration.
        model: the model that is trained.
        settings: from `complete_settings`, for the device of the optimizer's states.
    """
    groups = parameter_groups(model, config)
    arguments: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.betas,
        "eps": config.epsilon,
    }
    optimizer: torch.optim.Optimizer
    if config.algorithm == "muon":
        return _muon(model, groups, arguments)
    if offload_device(settings, "offload_optimizer") != "none":
        optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **arguments)
        return optimizer
    return torch.optim.AdamW(groups, fused=True, **arguments)


def _muon(model: TrainedVoxtral, groups: list[dict[str, Any]], adam: dict[str, Any]) -> torch.optim.Optimizer:
    # Importing it compiles kernels.
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    matrices = {id(parameter) for parameter in _block_matrices(model)}
    for parameter in model.parameters():
        parameter.use_muon = id(parameter) in matrices
    optimizer: torch.optim.Optimizer = MuonWithAuxAdam([part for group in groups for part in _split(group, adam)])
    return optimizer


def _block_matrices(model: TrainedVoxtral) -> Iterator[nn.Parameter]:
    for blocks in blocks_of(model).values():
        for block in blocks:
            yield from (parameter for parameter in block.parameters() if len(full_shape(parameter)) == 2)


def _split(group: dict[str, Any], adam: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Split a group into the parameters of AdamW, and a group of Muon's for each number of columns.

    DeepSpeed multiplies the update of a matrix by sqrt(max(1, rows / columns)). With the learning rate multiplied by
    0.2 sqrt(columns), the update's root mean square equals AdamW's (Liu et al., arXiv 2502.16982), so the configured
    rate suits both.
    """
    by_columns: dict[int, list[nn.Parameter]] = {}
    for parameter in group["params"]:
        by_columns.setdefault(full_shape(parameter)[1] if parameter.use_muon else 0, []).append(parameter)
    for columns, parameters in by_columns.items():
        part = group | {"params": parameters, "use_muon": columns > 0, "lr": adam["lr"]}
        if columns:
            scale_learning_rate(part, 0.2 * math.sqrt(columns))
        yield part if columns else part | adam
