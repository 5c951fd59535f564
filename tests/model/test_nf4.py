"""Rows in NF4: as exact as bitsandbytes' own double quantization, and the same in any partition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from voxtral_dist.model import nf4

functional = pytest.importorskip("bitsandbytes.functional")
ROWS, COLUMNS = 128, 3072


def weights(dtype: torch.dtype) -> Tensor:
    return (0.02 * torch.randn((ROWS, COLUMNS), generator=torch.Generator().manual_seed(0))).to(dtype)


def error(found: Tensor, expected: Tensor) -> float:
    """Root mean square relative to the values'."""
    difference = (found.float() - expected.float()).square().mean() / expected.float().square().mean()
    return float(difference.sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_worse_than_that_of_bitsandbytes(dtype: torch.dtype) -> None:
    given = weights(dtype)
    peer = functional.dequantize_4bit(
        *functional.quantize_4bit(given, blocksize=64, quant_type="nf4", compress_statistics=True)
    )
    packed = nf4.quantized(given)
    found = nf4.dequantized(packed, COLUMNS, dtype)
    assert found.dtype == dtype
    assert 0 < error(found, given) <= error(peer, given)
    assert packed.dtype == torch.uint8
    assert packed.shape == (ROWS, nf4.bytes_of_row(COLUMNS))
    assert 8 * packed.numel() / given.numel() < 4.15


def test_any_partition_of_rows_is_quantized_alike() -> None:
    given = weights(torch.bfloat16)
    packed = nf4.quantized(given)
    for start, stop in ((0, 50), (50, 51), (51, ROWS), (7, 7)):
        assert torch.equal(nf4.quantized(given[start:stop]), packed[start:stop])


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_rows_of_one_value_come_back_exactly(value: float) -> None:
    given = torch.full((3, 128), value)
    assert torch.equal(nf4.dequantized(nf4.quantized(given), 128, torch.float32), given)
