"""Linear layers whose weights are frozen and stored in four bits a value: the base of adapters (QLoRA)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from voxtral_dist.errors import UserError
from voxtral_dist.model import nf4


class QuantizedLinear(nn.Module):
    """A frozen linear layer; `weight` is uint8, a row of bytes for each output.

    in_features, out_features: as of a linear layer.
    """

    def __init__(self, layer: nn.Linear) -> None:
        """Take the place of a layer on the meta device."""
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        packed = torch.empty(
            (layer.out_features, nf4.bytes_of_row(layer.in_features)), dtype=torch.uint8, device=layer.weight.device
        )
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = layer.bias

    @property
    def num_weights(self) -> int:
        """Values of the matrix."""
        return self.in_features * self.out_features

    def forward(self, states: Tensor) -> Tensor:
        """The product with the dequantized matrix, in the precision of `(..., in_features)` states."""
        product: Tensor = _Product.apply(states, self.weight, self.in_features)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias


class _Product(torch.autograd.Function):
    """Keeps the packed matrix only, and dequantizes it again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, packed: Tensor, num_columns: int) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.num_columns = num_columns
        return F.linear(states, nf4.dequantized(packed, num_columns, states.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (packed,) = ctx.saved_tensors
        return gradients[0] @ nf4.dequantized(packed, ctx.num_columns, gradients[0].dtype), None, None


def quantize_linear_layers(block: nn.Module) -> None:
    """Replace the frozen linear layers of a block on the meta device, those inside adapters included.

    Raises:
        UserError: rows cannot be divided into blocks.
    """
    for parent, name, layer in list(_frozen_linear_layers(block)):
        if layer.in_features % nf4.BLOCK_VALUES:
            raise UserError(
                f"`trainable.lora.quantized`: layers must have a multiple of {nf4.BLOCK_VALUES} inputs, but "
                f"`{name}` has {layer.in_features} instead: quantize another component."
            )
        setattr(parent, name, QuantizedLinear(layer))


def _frozen_linear_layers(block: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for parent in block.modules():
        # peft keeps the matrices of adapters in dictionaries.
        for name, layer in () if isinstance(parent, nn.ModuleDict) else parent.named_children():
            if isinstance(layer, nn.Linear) and not layer.weight.requires_grad:
                yield parent, name, layer


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantized layers of a model by the names of their weights."""
    return {f"{name}.weight": one for name, one in model.named_modules() if isinstance(one, QuantizedLinear)}
