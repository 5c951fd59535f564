"""A run's model, filled and sharded parameter by parameter: under ZeRO-3 no process ever holds the whole of it."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.utils import groups
from torch import Tensor, nn

from voxtral_dist.config import RunConfig
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.zero_settings import zero_stage
from voxtral_dist.model import TrainedVoxtral, initialize_buffers, set_tensor
from voxtral_dist.weights import InitialWeights


def fill_model(model: TrainedVoxtral, config: RunConfig, settings: dict[str, Any], world: World) -> None:
    """Give a skeleton its first weights, on this rank's device or, under stage 3, wherever the settings keep its part.

    Args:
        model: on the meta device.
        config: of the run.
        settings: DeepSpeed's, complete: where parts are kept (`offload_param`), and which ranks share them.
        world: this rank among all.

    Raises:
        UserError: the checkpoint does not fit the skeleton.
    """
    initialize_buffers(model, world.device)
    weights = InitialWeights(config.model.path, model, config.seed)
    if zero_stage(settings) < 3:
        weights.fill(model, world.device)
    else:
        _fill_sharded(model, weights, settings, world)


def _fill_sharded(model: nn.Module, weights: InitialWeights, settings: dict[str, Any], world: World) -> None:
    """Replace each parameter of a skeleton by one that has its value and is sharded before the next one is read."""
    shard = _Sharding(settings)
    for name, skeleton in list(model.named_parameters()):
        parameter = nn.Parameter(_first_value(name, skeleton, weights, world), requires_grad=skeleton.requires_grad)
        set_tensor(model, name, parameter)
        shard(parameter)


def _first_value(name: str, skeleton: nn.Parameter, weights: InitialWeights, world: World) -> Tensor:
    """The value of a parameter on rank 0. On others, which DeepSpeed sends it to, only the room for it."""
    if world.is_first:
        return weights(name).to(world.device, skeleton.dtype)
    return torch.empty(skeleton.shape, dtype=skeleton.dtype, device=world.device)


class _Sharding:
    """Shards parameters in place, all by one `zero.Init`: it makes groups of ranks and buffers for NVMe."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._first: Any = None

    def __call__(self, parameter: nn.Parameter) -> None:
        if self._first is None:
            deepspeed.zero.Init(
                module=nn.ParameterList([parameter]),
                config_dict_or_path=self._settings,
                # DeepSpeed makes ZeRO++'s groups once in a process.
                zero_param_parallel_group=groups._get_zero_param_intra_parallel_group(),
            )
            self._first = parameter
        else:
            # What DeepSpeed does with parameters that are added later.
            self._first.convert_to_zero_parameters([parameter])
