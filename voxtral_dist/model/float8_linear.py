"""Linear layers that train in eight-bit floating point; imports torchao, see `voxtral_dist.model.float8`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor, nn
from torch.nn import functional as F
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8.float8_linear import Float8Linear

from voxtral_dist.model.trainable import is_adapter

# What products in float8 need of both dimensions of a matrix.
MULTIPLE = 16


class Float8InTraining(Float8Linear):  # type: ignore[misc]  # of a package without types
    """A linear layer that computes in float8 in training mode, and as torch's own in evaluation mode."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """The product with the weights, in the precision of `(..., in_features)` input."""
        product: Tensor = super().forward(input) if self.training else F.linear(input, self.weight, self.bias)
        return product


def convert_linear_layers(blocks: Iterable[nn.Module], *, is_emulated: bool) -> int:
    """Replace layers of blocks by `Float8InTraining` in place; names of parameters stay. Their number.

    Converted are layers whose weights are trained, but no adapters, and have multiples of 16 inputs and outputs.
    """
    # A gradient of weights is a sum over positions, whose number need not be a multiple of 16.
    config = replace(Float8LinearConfig.from_recipe_name("rowwise"), pad_inner_dim=True, emulate=is_emulated)
    number = 0
    for block in blocks:
        convert_to_float8_training(block, module_filter_fn=_is_converted, config=config)
        for layer in block.modules():
            if isinstance(layer, Float8Linear):
                layer.__class__ = Float8InTraining
                number += 1
    return number


def _is_converted(layer: nn.Module, name: str) -> bool:
    if not isinstance(layer, nn.Linear) or is_adapter(f"{name}.weight"):
        return False
    return layer.weight.requires_grad and layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0
