"""Pinned memory on a machine without a GPU: DeepSpeed pins, and it is noted when the memory is freed.

DeepSpeed pins nothing on a CPU. Here `pin_memory` copies a tensor into memory of its own, as on a GPU.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class PinnedLog:
    """What happened in order: `("pin", number)`, `("free", number)` and notes; and the bytes of each number."""

    sizes: list[int] = field(default_factory=list)
    events: list[tuple[str, int]] = field(default_factory=list)

    def copy_of(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor whose end is noted."""
        memory = np.empty(max(1, tensor.nbytes), np.uint8)
        number = len(self.sizes)
        self.sizes.append(tensor.nbytes)
        self.events.append(("pin", number))
        weakref.finalize(memory, self.events.append, ("free", number))
        # No view, because a view keeps its base alive when its data is replaced.
        pinned = torch.empty(0, dtype=tensor.dtype)
        pinned.set_(torch.from_numpy(memory).untyped_storage(), 0, tensor.shape)
        return pinned.copy_(tensor.detach())

    def note(self, name: str) -> None:
        """Add an event that is no allocation."""
        self.events.append((name, 0))


def install_pinning() -> PinnedLog:
    """Make DeepSpeed's accelerator of this process pin memory, for good."""
    from deepspeed.accelerator import get_accelerator

    log = PinnedLog()
    accelerator: Any = type(get_accelerator())
    accelerator.pin_memory = lambda self, tensor, make_copy=True, match_shape=True: log.copy_of(tensor)
    accelerator._pin_fresh = lambda self, template, shape: log.copy_of(template.new_empty(shape))
    accelerator.is_pinned = lambda self, tensor: False
    return log


def install_fsdp2_pinning() -> PinnedLog:
    """Make FSDP2 of this process pin what it offloads, for good; so far it is told to do so for GPUs only."""
    from voxtral_dist.engine.fsdp2 import sharding

    log, policy = PinnedLog(), sharding.CPUOffloadPolicy
    sharding.CPUOffloadPolicy = lambda pin_memory: policy(pin_memory=True)  # type: ignore[assignment, attr-defined, misc]
    torch.Tensor.pin_memory = lambda self: log.copy_of(self)  # type: ignore[assignment, method-assign]
    torch.Tensor.is_pinned = lambda self: False  # type: ignore[assignment, method-assign]
    return log


class CachingHostAllocator:
    """torch's allocator of pinned memory (`ATen/core/CachingHostAllocator.h` of torch 2.13), fed with events.

    held: bytes that it has of the system. peak: its largest value. A limit of None is torch's default.
    """

    def __init__(self, max_cached: int | None) -> None:
        self._max_cached = max_cached if max_cached is not None else 2**62
        self._free_lists: dict[int, list[int]] = {}
        self._blocks: dict[int, int] = {}
        self.held = self.peak = 0

    def play(self, log: PinnedLog) -> None:
        """Allocate and free in the order of a log."""
        for name, number in log.events:
            match name:
                case "pin":
                    self._allocate(number, log.sizes[number])
                case "free":
                    self._free(self._blocks.pop(number))
                case "return":
                    self.held -= sum(sum(sizes) for sizes in self._free_lists.values())
                    self._free_lists = {}

    def _allocate(self, number: int, size: int) -> None:
        rounded = 2 ** (size - 1).bit_length() if 0 < size <= self._max_cached else size
        free = self._free_lists.get(rounded.bit_length(), [])
        if free:
            self._blocks[number] = free.pop()
            return
        self._blocks[number] = rounded
        self.held += rounded
        self.peak = max(self.peak, self.held)

    def _free(self, size: int) -> None:
        if size > self._max_cached:
            self.held -= size
        else:
            self._free_lists.setdefault(size.bit_length(), []).append(size)
