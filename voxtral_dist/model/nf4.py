"""Matrices in four bits a value: NormalFloat4 with double quantization (Dettmers et al., arXiv 2305.14314).

A row of C values is stored by itself, so any partition of rows is quantized alike, whoever holds it:

    C / 2    bytes, two codes of NF4 in each
    C / 64   codes of the largest magnitude in each block of 64 values
    8        the smallest of these magnitudes, and the step between codes: float32

These are 4.15 bits a value for Voxtral-Mini's rows of 3,072. All bytes of a row lie in one row of an uint8 matrix: an
engine shards it as it shards any other matrix, and casts nothing. The paper quantizes magnitudes over 256 blocks, which
cross rows; bitsandbytes computes its codes of NF4 here.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from voxtral_dist.errors import UserError

BLOCK_VALUES = 64
# The smallest magnitude of a row and the step between its codes.
_FLOATS_OF_ROW = 2
_LARGEST_CODE = 255


def refuse_without_bitsandbytes() -> None:
    """Refuse quantization where bitsandbytes is missing.

    Raises:
        UserError: it is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "`trainable.lora.quantized` needs the package bitsandbytes: install it by `pip install "
            "'voxtral-dist[qlora]'`."
        )


def bytes_of_row(num_columns: int) -> int:
    """Bytes of a row of this many values, a multiple of `BLOCK_VALUES`."""
    return num_columns // 2 + num_columns // BLOCK_VALUES + _FLOATS_OF_ROW * torch.float32.itemsize


def quantized(values: Tensor) -> Tensor:
    """The rows of a floating point matrix `(R, C)` as uint8 `(R, bytes of a row)`, on its device."""
    # Registers operations in torch's namespace.
    import bitsandbytes  # noqa: F401

    rows, columns = values.shape
    if not rows:
        return torch.empty((0, bytes_of_row(columns)), dtype=torch.uint8, device=values.device)
    codes, largest = torch.ops.bitsandbytes.quantize_4bit(values.contiguous(), BLOCK_VALUES, "nf4", torch.uint8)
    magnitudes = largest.view(rows, -1).float()
    smallest = magnitudes.amin(1, keepdim=True)
    step = (magnitudes.amax(1, keepdim=True) - smallest) / _LARGEST_CODE
    # Where all magnitudes are equal, the step is 0 and so are their codes.
    of_blocks = ((magnitudes - smallest) / torch.where(step > 0, step, 1.0)).round().to(torch.uint8)
    floats = torch.cat([smallest, step], dim=1).view(torch.uint8)
    return torch.cat([codes.view(rows, -1), of_blocks, floats], dim=1)


def dequantized(packed: Tensor, num_columns: int, dtype: torch.dtype) -> Tensor:
    """The matrix `(R, C)` whose rows this process has packed by `quantized`, up to rounding."""
    rows, num_blocks = len(packed), num_columns // BLOCK_VALUES
    sizes = [num_columns // 2, num_blocks, packed.shape[1] - num_columns // 2 - num_blocks]
    codes, of_blocks, floats = torch.split(packed, sizes, dim=1)
    smallest, step = torch.split(floats.contiguous().view(torch.float32), 1, dim=1)
    magnitudes = (smallest + step * of_blocks).flatten()
    values: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        codes.reshape(-1, 1), magnitudes, BLOCK_VALUES, "nf4", [rows, num_columns], dtype
    )
    return values
