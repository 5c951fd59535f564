"""Adam's moments in 8 bits each, in blocks of 256 neighbouring values of a row.

A block has two float32 scales (Dettmers et al., arXiv 2110.02861, who quantize both moments themselves). Here the

- *second moment* v is stored by its root r = sqrt(v), the denominator of an update, over the largest r of the block, as
  a float of 4 bits of exponent and 4 of fraction: at most 3 % wrong over a range of 10^4.8 in r, or 10^9.6 in v. No
  code stands for zero: a denominator that is lost would make the next update huge. So v is 0 only in blocks of zeros.
- *first moment* m is stored by m / r, the direction of an update, in 127 equal steps to each side. Its size is bounded
  whatever the spread of gradients in a block.

Both are rounded to the nearest code. Blocks lie within rows, so ranks that hold whole rows hold whole blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

BLOCK_SIZE = 256
# Names of the moments on disk and in torch.
FIRST, SECOND = "exp_avg", "exp_avg_sq"
# Scales of a quantized moment, beside its codes.
SCALE = ".scale"

# In the order of `encode`.
_KEYS = (FIRST, FIRST + SCALE, SECOND, SECOND + SCALE)

# Bits that remain of a float32 are those above its 19 last ones. 1.0 has the code 255.
_CUT_BITS = 19
_CODE_OF_ONE = 0x3F800000 >> _CUT_BITS
_FIRST_CODE = _CODE_OF_ONE - 255
_STEPS = 127.0


def has_blocks(shape: tuple[int, ...]) -> bool:
    """Whether the rows of a tensor, along its first dimension, are whole blocks."""
    return len(shape) > 1 and prod(shape[1:]) % BLOCK_SIZE == 0


def scales_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of the scales of a tensor with blocks: (rows, blocks of a row)."""
    return shape[0], prod(shape[1:]) // BLOCK_SIZE


def encode(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantize moments `(blocks, 256)` in float32.

    Returns:
        int8 codes and scales `(blocks, 1)` of the first, uint8 codes and scales of the second moment.
    """
    roots = second.sqrt()
    root_scales = roots.amax(1, keepdim=True)
    root_codes = _root_codes(roots / _no_zero(root_scales))
    # The first moment relates to the root that is read back.
    directions = first / _no_zero(_roots(root_codes, root_scales))
    scales = directions.abs().amax(1, keepdim=True)
    codes = torch.round(directions / _no_zero(scales) * _STEPS).to(torch.int8)
    return codes, scales, root_codes, root_scales


def decode(codes: Tensor, scales: Tensor, root_codes: Tensor, root_scales: Tensor) -> tuple[Tensor, Tensor]:
    """The moments `(blocks, 256)` in float32; arguments as `encode` returns them."""
    roots = _roots(root_codes, root_scales)
    return codes / _STEPS * scales * roots, roots * roots


def quantize(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Local rows of float32 moments as those of a parameter with blocks, by name."""
    first, second = moments[FIRST], moments[SECOND]
    codes, scales, root_codes, root_scales = encode(first.reshape(-1, BLOCK_SIZE), second.reshape(-1, BLOCK_SIZE))
    shape = scales_shape(tuple(first.shape))
    return {
        FIRST: codes.view(first.shape),
        FIRST + SCALE: scales.view(shape),
        SECOND: root_codes.view(first.shape),
        SECOND + SCALE: root_scales.view(shape),
    }


def dequantize(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rows of moments in float32, whether they are quantized or not, by name."""
    if FIRST + SCALE not in moments:
        return dict(moments)
    shape = moments[FIRST].shape
    first, second = decode(*moment_blocks(moments))
    return {FIRST: first.view(shape), SECOND: second.view(shape)}


def moment_blocks(moments: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Codes `(blocks, 256)` and scales `(blocks, 1)` of both moments, as `encode` returns them."""
    return tuple(moments[key].reshape(-1, 1 if key.endswith(SCALE) else BLOCK_SIZE) for key in _KEYS)


def _root_codes(fractions: Tensor) -> Tensor:
    """uint8 codes of values from 0 to 1."""
    rounded = (fractions.view(torch.int32) + (1 << (_CUT_BITS - 1))) >> _CUT_BITS
    return (rounded - _FIRST_CODE).clamp(0, 255).to(torch.uint8)


def _roots(codes: Tensor, scales: Tensor) -> Tensor:
    return ((codes.to(torch.int32) + _FIRST_CODE) << _CUT_BITS).view(torch.float32) * scales


def _no_zero(scales: Tensor) -> Tensor:
    """Divisors of values that are all zero where the divisor is."""
    return torch.where(scales > 0, scales, 1.0)
