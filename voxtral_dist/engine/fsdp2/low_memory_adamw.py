"""AdamW on sharded parameters whose moments have 8 bits, or whose weights have no float32 copy.

An update depends on its values and their places in the full parameter alone: not on the partition of a rank, and not on
random numbers drawn before. So a run resumes bit for bit, and equal gradients give equal bits on any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from voxtral_dist.config import OptimizerConfig
from voxtral_dist.distributed.devices import on_device
from voxtral_dist.engine.fsdp2.block_states import (
    BLOCK_SIZE,
    FIRST,
    SCALE,
    SECOND,
    decode,
    encode,
    has_blocks,
    moment_blocks,
    scales_shape,
)
from voxtral_dist.engine.fsdp2.kernels import Kernels
from voxtral_dist.engine.fsdp2.rounding import MAX_VALUES, random_bits, random_keys, to_bfloat16, wrapped
from voxtral_dist.engine.fsdp2.sharding import first_position, local_part, with_local
from voxtral_dist.model.trainable import is_adapter


def quantized_names(model: nn.Module) -> set[str]:
    """Names of the trained parameters whose moments have 8 bits.

    Those of the embedding stay float32, because the gradients of rare tokens come seldom and differ most within a
    block; those of vectors and adapters, because they are small; and those of rows that are no whole blocks.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        name
        for name, one in model.named_parameters()
        if one.requires_grad and has_blocks(tuple(one.shape)) and not is_adapter(name) and id(one) not in embeddings
    }


def zero_moments(parameter: Tensor, *, is_quantized: bool) -> dict[str, Tensor]:
    """Sharded moments of a parameter before its first update, by their names on disk."""
    local = local_part(parameter)
    if not is_quantized:
        return {key: with_local(parameter, torch.zeros_like(local, dtype=torch.float32)) for key in (FIRST, SECOND)}
    shape = scales_shape(tuple(parameter.shape))
    scales = torch.zeros(local.shape[0], shape[1], device=local.device)
    return {
        FIRST: with_local(parameter, torch.zeros_like(local, dtype=torch.int8)),
        FIRST + SCALE: with_local(parameter, scales, shape),
        SECOND: with_local(parameter, torch.zeros_like(local, dtype=torch.uint8)),
        SECOND + SCALE: with_local(parameter, scales.clone(), shape),
    }


class LowMemoryAdamW(torch.optim.Optimizer):
    """AdamW of `optimizer.algorithm: adamw_8bit`, or of weights in bfloat16.

    The state of a parameter holds its moments as `zero_moments` makes them, and `step`, the number of updates.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        names: Mapping[nn.Parameter, str],
        quantized: set[str],
        config: OptimizerConfig,
        seed: int,
    ) -> None:
        """Create moments of zero.

        Args:
            groups: from `parameter_groups`.
            names: name of each trained parameter, a key of its random bits.
            quantized: see `quantized_names`.
            config: section `optimizer` of the configuration.
            seed: seed of the rounding of weights.
        """
        super().__init__(groups, {"lr": config.learning_rate})
        self._names = names
        self._betas = config.betas
        self._epsilon = config.epsilon
        self._seed = seed
        self._kernels = Kernels([local_part(one) for one in names])
        for parameter, name in names.items():
            assert parameter.numel() < MAX_VALUES, f"{name} has more values than positions of random bits"
            self.state[parameter] = {"step": 0, **zero_moments(parameter, is_quantized=name in quantized)}

    @torch.no_grad()
    def step(self, gradient_factor: float = 1.0) -> None:  # type: ignore[override]  # there is no closure
        """Update all parameters that have gradients.

        Args:
            gradient_factor: factor of all gradients, such as that of clipping.
        """
        for group in self.param_groups:
            parameters = [one for one in group["params"] if one.grad is not None]
            if parameters:
                self._update(parameters, group["lr"], group["weight_decay"], gradient_factor)

    def _update(self, parameters: list[nn.Parameter], rate: float, decay: float, gradient_factor: float) -> None:
        # Parameters of a group have been updated equally often.
        num_updates = self.state[parameters[0]]["step"] + 1
        first_left, second_left = (1.0 - beta**num_updates for beta in self._betas)
        numbers = [gradient_factor, rate * decay, rate / first_left, 1.0 / math.sqrt(second_left), self._epsilon]
        keys = random_keys(self._seed, num_updates, [self._names[one] for one in parameters])
        calls: list[tuple[Callable[..., None], tuple[Tensor, ...]]] = []
        places: list[tuple[int, int, int]] = []
        for parameter, key in zip(parameters, keys, strict=True):
            self.state[parameter]["step"] = num_updates
            for update, tensors, start in self._chunks(parameter):
                calls.append((update, tensors))
                places.append((*key, wrapped(start)))
        device = local_part(parameters[0]).device
        scalars = on_device(torch.tensor(numbers), device)
        placed = on_device(torch.tensor(places, dtype=torch.int32), device)
        for (update, tensors), place in zip(calls, placed, strict=True):
            update(*tensors, scalars, place, *self._betas)

    def _chunks(self, parameter: nn.Parameter) -> Iterator[tuple[Callable[..., None], tuple[Tensor, ...], int]]:
        """Yield an update, its tensors, and the position of their first value, for parts of a rank's rows."""
        assert parameter.grad is not None
        weight, gradient = local_part(parameter).view(-1), local_part(parameter.grad).reshape(-1)
        moments = {key: local_part(one) for key, one in self.state[parameter].items() if key != "step"}
        has_scales = FIRST + SCALE in moments
        update = self._kernels(_update_blocks if has_scales else _update_values)
        parts = moment_blocks(moments) if has_scales else tuple(one.view(-1) for one in moments.values())
        size = self._kernels.chunk_values
        start = first_position(parameter)
        for weights, gradients, *states in zip(
            torch.split(weight, size),
            torch.split(gradient, size),
            *(torch.split(one, size // BLOCK_SIZE if has_scales else size) for one in parts),
            strict=True,
        ):
            if weights.numel():
                yield update, (weights, gradients, *states), start
            start += weights.numel()


def _update_blocks(
    weight: Tensor,
    gradient: Tensor,
    codes: Tensor,
    scales: Tensor,
    root_codes: Tensor,
    root_scales: Tensor,
    scalars: Tensor,
    place: Tensor,
    beta1: float,
    beta2: float,
) -> None:
    """Update a chunk of weights and its quantized moments in place."""
    first, second = decode(codes, scales, root_codes, root_scales)
    weights, gradients = weight.view(-1, BLOCK_SIZE), gradient.view(-1, BLOCK_SIZE)
    updated, first, second = _adamw(weights, gradients, first, second, scalars, beta1, beta2)
    _store(weight, updated.view(-1), place)
    for stored, new in zip((codes, scales, root_codes, root_scales), encode(first, second), strict=True):
        stored.copy_(new)


def _update_values(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    scalars: Tensor,
    place: Tensor,
    beta1: float,
    beta2: float,
) -> None:
    """Update a chunk of weights and its float32 moments in place."""
    updated, new_first, new_second = _adamw(weight, gradient, first, second, scalars, beta1, beta2)
    _store(weight, updated, place)
    first.copy_(new_first)
    second.copy_(new_second)


def _adamw(
    weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, scalars: Tensor, beta1: float, beta2: float
) -> tuple[Tensor, Tensor, Tensor]:
    """New weights and moments in float32 (Loshchilov and Hutter, arXiv 1711.05101, as torch computes it).

    Products and sums are separate operations: fused ones would round differently at the end of a partition.
    """
    factor, decay, rate, root_factor, epsilon = scalars.unbind()
    weight, gradient = weight.float(), gradient.float() * factor
    first = first * beta1 + gradient * (1.0 - beta1)
    second = second * beta2 + gradient * gradient * (1.0 - beta2)
    change = weight * decay + first / (second.sqrt() * root_factor + epsilon) * rate
    return weight - change, first, second


def _store(weight: Tensor, values: Tensor, place: Tensor) -> None:
    if weight.dtype == torch.bfloat16:
        weight.copy_(to_bfloat16(values, random_bits(place, values.numel())))
    else:
        weight.copy_(values)
