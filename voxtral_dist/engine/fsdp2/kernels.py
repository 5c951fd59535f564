"""Elementwise updates in plain torch, in parts that bound their temporary tensors, and compiled where that pays."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

# Values that are updated at a time. Plain torch makes about ten temporary tensors of that size, which should stay in a
# CPU's cache; compiled kernels make none.
_PLAIN_VALUES = 2**16
_COMPILED_VALUES = 2**26
# A compiled update is 20 times as fast on a CPU and takes a minute to compile: below this size plain torch is sooner
# done.
_MIN_COMPILED_VALUES = 2**24


class Kernels:
    """Chooses the form of updates for the tensors of a rank.

    chunk_values: values of a tensor that are updated at a time, a multiple of the size of a block.
    """

    def __init__(self, updated: Sequence[Tensor]) -> None:
        """Choose by the device and the number of values that are updated in a step."""
        is_cuda = any(one.is_cuda for one in updated)
        is_large = sum(one.numel() for one in updated) >= _MIN_COMPILED_VALUES
        self._is_compiled = is_cuda or (is_large and _has_compiler())
        self.chunk_values = _COMPILED_VALUES if self._is_compiled else _PLAIN_VALUES

    def __call__(self, function: Callable[..., None]) -> Callable[..., None]:
        """The function, or its compiled form."""
        return _compiled(function) if self._is_compiled else function


@cache
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    # One kernel for parameters of all shapes.
    return torch.compile(function, dynamic=True, fullgraph=True)


def _has_compiler() -> bool:
    return shutil.which(os.environ.get("CXX", "g++")) is not None
