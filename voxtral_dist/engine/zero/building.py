"""A model filled and sharded parameter by parameter: under ZeRO-3 no process ever holds all of it."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.utils import groups, set_z3_leaf_module
from torch import Tensor, nn

from voxtral_dist.distributed.world import World
from voxtral_dist.engine.zero.settings import zero_stage
from voxtral_dist.model.blocks import blocks_of
from voxtral_dist.model.voxtral import TrainedVoxtral, initialize_buffers, set_tensor
from voxtral_dist.model.weights import InitialWeights


def fill_model(model: TrainedVoxtral, initial: InitialWeights, settings: dict[str, Any], world: World) -> None:
    """Give a model on the meta device its initial weights.

    Args:
        model: on the meta device; ends on this rank's device or, under stage 3, where `offload_param` keeps partitions.
        initial: the weights.
        settings: from `complete_settings`.
        world: all ranks.

    Raises:
        UserError: the weights cannot be read.
    """
    initialize_buffers(model, world.device)
    if zero_stage(settings) < 3:
        initial.fill(model, world.device)
    else:
        _fill_sharded(model, initial, settings, world)


def _fill_sharded(model: nn.Module, initial: InitialWeights, settings: dict[str, Any], world: World) -> None:
    """Read and shard one parameter after the other."""
    shard = _Sharding(settings)
    for name, on_meta in list(model.named_parameters()):
        value = _initial_value(name, on_meta, initial, world)
        parameter = nn.Parameter(value, requires_grad=on_meta.requires_grad)
        set_tensor(model, name, parameter)
        shard(parameter)


def _initial_value(name: str, on_meta: nn.Parameter, initial: InitialWeights, world: World) -> Tensor:
    """A parameter's value on rank 0; on other ranks uninitialized memory, which DeepSpeed broadcasts the value into."""
    if world.is_first:
        return initial(name).to(world.device, on_meta.dtype)
    return torch.empty(on_meta.shape, dtype=on_meta.dtype, device=world.device)


def gather_whole_blocks(model: TrainedVoxtral, *, encoder_has_one_chunk: bool) -> None:
    """Let ZeRO-3 gather a block at once instead of layer by layer, where possible: fewer hooks cost less time.

    DeepSpeed reduces the gradients of such a "leaf module" as soon as the gradient of the module's input exists. So the
    input must require a gradient, every parameter must be trained, and a forward pass must call the module only once.
    """
    embeddings = model.model.language_model.embed_tokens
    can_be_whole = {
        "encoder": encoder_has_one_chunk and model.model.audio_tower.conv1.weight.requires_grad,
        "language_model": embeddings.weight.requires_grad,
    }
    for component, blocks in blocks_of(model).items():
        for block in blocks if can_be_whole.get(component) else []:
            if all(parameter.requires_grad for parameter in block.parameters()):
                set_z3_leaf_module(block, True)


class _Sharding:
    """Shards parameters in place by a single `zero.Init`, which creates process groups and buffers for NVMe."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._first: Any = None

    def __call__(self, parameter: nn.Parameter) -> None:
        if self._first is None:
            deepspeed.zero.Init(
                module=nn.ParameterList([parameter]),
                config_dict_or_path=self._settings,
                # DeepSpeed creates ZeRO++'s groups once per process.
                zero_param_parallel_group=groups._get_zero_param_intra_parallel_group(),
            )
            self._first = parameter
        else:
            # DeepSpeed's own way to add parameters later.
            self._first.convert_to_zero_parameters([parameter])
