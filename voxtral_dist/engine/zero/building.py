"""A run's model, filled and sharded parameter by parameter: under ZeRO-3 no process ever holds the whole of it."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.utils import groups, set_z3_leaf_module
from torch import Tensor, nn

from voxtral_dist.config import RunConfig
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.zero.settings import zero_stage
from voxtral_dist.model.voxtral import TrainedVoxtral, blocks_of, initialize_buffers, set_tensor
from voxtral_dist.model.weights import InitialWeights


def fill_model(model: TrainedVoxtral, config: RunConfig, settings: dict[str, Any], world: World) -> None:
    """Give a meta model its first weights, on this rank's device or, under stage 3, where the settings keep its part.

    Args:
        model: on the meta device.
        config: of the run.
        settings: DeepSpeed's, complete: where parts are kept (`offload_param`), and which ranks share them.
        world: this rank among all.

    Raises:
        UserError: the checkpoint does not fit the meta_model.
    """
    initialize_buffers(model, world.device)
    weights = InitialWeights(config.model.path, model, config.seed)
    if zero_stage(settings) < 3:
        weights.fill(model, world.device)
    else:
        _fill_sharded(model, weights, settings, world)


def _fill_sharded(model: nn.Module, weights: InitialWeights, settings: dict[str, Any], world: World) -> None:
    """Replace each parameter of a meta_model by one that has its value and is sharded before the next one is read."""
    shard = _Sharding(settings)
    for name, meta_model in list(model.named_parameters()):
        parameter = nn.Parameter(_first_value(name, meta_model, weights, world), requires_grad=meta_model.requires_grad)
        set_tensor(model, name, parameter)
        shard(parameter)


def _first_value(name: str, meta_model: nn.Parameter, weights: InitialWeights, world: World) -> Tensor:
    """The value of a parameter on rank 0. On others, which DeepSpeed sends it to, only the room for it."""
    if world.is_first:
        return weights(name).to(world.device, meta_model.dtype)
    return torch.empty(meta_model.shape, dtype=meta_model.dtype, device=world.device)


def gather_whole_blocks(model: TrainedVoxtral, *, encoder_has_one_chunk: bool) -> None:
    """Let ZeRO-3 gather each block at once, where it can, in place of each layer by itself: its hooks cost less.

    DeepSpeed reduces the gradients of such a "leaf module" when the gradient of the module's input is there. So the
    input must need one, every parameter must be trained, and the module must be called once in a forward pass.
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
