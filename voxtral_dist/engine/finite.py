"""Which tensors hold values that are not finite numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def names_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors that hold NaN or infinity; whole numbers never do.

    The largest magnitude of each decides, which takes no memory beside it.
    """
    largest = [
        (name, torch.linalg.vector_norm(tensor, math.inf))
        for name, tensor in tensors
        if tensor.is_floating_point() and tensor.numel()
    ]
    return [name for name, value in largest if not math.isfinite(float(value))]
