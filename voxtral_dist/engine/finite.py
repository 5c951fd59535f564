"""Which tensors hold values that are not finite numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def names_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors that hold NaN or infinity; whole numbers never do.

    A sum, which takes no memory beside a tensor, is finite only if all values are. Where it is not, it may have
    overflowed: then the largest magnitude decides, which takes eight times as long on a CPU.
    """
    sums = [
        (name, tensor, tensor.sum(dtype=torch.float32))
        for name, tensor in tensors
        if tensor.is_floating_point() and tensor.numel()
    ]
    doubtful = [(name, tensor) for name, tensor, value in sums if not math.isfinite(float(value))]
    return [name for name, tensor in doubtful if not math.isfinite(float(torch.linalg.vector_norm(tensor, math.inf)))]
