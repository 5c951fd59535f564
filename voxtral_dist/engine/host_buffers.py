"""Host memory for copies of an engine's state, kept from one checkpoint to the next."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor


class HostBuffers:
    """One tensor in host memory for each tensor that was copied, pinned where that was on a GPU.

    Memory that a process touches for the first time costs several times the copy, and pinned memory more than that.
    """

    def __init__(self) -> None:
        """No memory, until something is copied."""
        self._buffers: dict[Hashable, Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Size of all of them in bytes."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    @torch.no_grad()
    def copy(self, key: Hashable, tensor: Tensor) -> Tensor:
        """A copy of a tensor, until the next one with the same key; from a GPU it is under way until `wait`."""
        buffer = self._buffers.get(key)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(tensor.detach(), non_blocking=tensor.is_cuda)

    def wait(self) -> None:
        """Wait for copies that are under way."""
        if any(buffer.is_pinned() for buffer in self._buffers.values()):
            torch.cuda.synchronize()
