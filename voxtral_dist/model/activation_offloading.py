"""Activations in host memory between the forward and the backward pass, by torch's hooks for saved tensors.

`torch.autograd.graph.save_on_cpu` waits for each of its copies. Here, as in torchtune, copies run on a stream of their
own: a tensor leaves while the next block is computed, and comes back while the block behind it is. The host waits for
nothing.

Host memory is pinned and divided into pages that any later tensor takes again: lengths of speech differ, and torch's
allocator of pinned memory keeps a block of every size that was ever asked for.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

_PAGE_BYTES = 32 * 2**20
# Tensors on their way to the host; before there is another one, the device waits for the first of them.
_MAX_LEAVING = 1


class ActivationOffloading:
    """Moves the tensors that autograd saves inside `saving` to host memory, and back when they are needed.

    Tensors on a CPU are copied too, which saves nothing there: the code is the same on every device.
    """

    def __init__(self) -> None:
        self._hosts: dict[torch.device, HostMemory] = {}
        self._leaving: deque[_Offloaded] = deque()
        self._newest: Callable[[], _Offloaded | None] = _gone

    def saving(self) -> AbstractContextManager[Any]:
        """Context whose saved tensors are offloaded. Of a checkpoint inside it, these are the inputs alone."""
        return torch.autograd.graph.saved_tensors_hooks(self._offload, self._restore)

    def _offload(self, tensor: Tensor) -> _Offloaded:
        host = self._hosts.setdefault(tensor.device, HostMemory(tensor.device))
        offloaded = _Offloaded(tensor.detach().contiguous(), host, self._newest)
        self._newest = weakref.ref(offloaded)
        self._leaving.append(offloaded)
        while len(self._leaving) > _MAX_LEAVING:
            self._leaving.popleft().leave()
        return offloaded

    def _restore(self, offloaded: _Offloaded) -> Tensor:
        if offloaded in self._leaving:
            self._leaving.remove(offloaded)
        tensor = offloaded.take()
        before = offloaded.before()
        if before is not None:
            before.fetch()
        return tensor


class _Offloaded:
    """A tensor in pages of host memory, and on the device too while it is being copied.

    before: returns the tensor that was offloaded before this one, which the backward pass needs after it; None where it
    is no longer needed.
    """

    def __init__(self, tensor: Tensor, host: HostMemory, before: Callable[[], _Offloaded | None]) -> None:
        self.before = before
        self._host = host
        self._like = torch.empty_like(tensor, device="meta")
        self._on_device: Tensor | None = tensor
        self._pages = host.take_pages(tensor.nbytes)
        self._copied = host.copy(self._pairs(to_host=True))

    def __del__(self) -> None:
        # Autograd lets go of what it saved: when the backward pass has used it, or will never come.
        self._host.give_pages(self._pages)

    def leave(self) -> None:
        """Free the tensor on the device after it has been copied."""
        self._host.wait(self._copied)
        self._on_device = None

    def fetch(self) -> None:
        """Begin to copy the tensor to the device, unless it is there."""
        if self._on_device is None:
            self._on_device = torch.empty_like(self._like, device=self._host.device)
            self._copied = self._host.copy(self._pairs(to_host=False))

    def take(self) -> Tensor:
        """The tensor on the device, which then holds it no longer than the caller does."""
        self.fetch()
        self._host.wait(self._copied)
        tensor, self._on_device = self._on_device, None
        assert tensor is not None, "it was fetched"
        return tensor

    def _pairs(self, *, to_host: bool) -> list[tuple[Tensor, Tensor]]:
        """Target and source of each copy."""
        assert self._on_device is not None, "it is copied from there, or to there"
        pieces = self._on_device.view(-1).view(torch.uint8).split(_PAGE_BYTES)  # type: ignore[no-untyped-call]
        pairs = [(page[: len(piece)], piece) for page, piece in zip(self._pages, pieces, strict=True)]
        return pairs if to_host else [(piece, page) for page, piece in pairs]


def _gone() -> None:
    """The tensor before the first one."""


class HostMemory:
    """Pages of host memory for tensors of a device, and the stream on which all copies run, in order.

    So a page that is given back may be taken at once: whoever copies into it next waits for those who still read it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free: list[Tensor] = []
        self._stream = torch.Stream(device=device) if device.type != "cpu" else None

    def take_pages(self, num_bytes: int) -> list[Tensor]:
        """Pages for a tensor: free ones if there are any, else new ones."""
        count = max(1, -(-num_bytes // _PAGE_BYTES))
        return [self._free.pop() if self._free else self._new_page() for _ in range(count)]

    def give_pages(self, pages: list[Tensor]) -> None:
        """Make pages free again."""
        self._free.extend(pages)

    def copy(self, pairs: list[tuple[Tensor, Tensor]]) -> torch.Event | None:
        """Begin to copy; each pair is a target and a source. The event is over when all are copied."""
        if self._stream is None:
            for target, source in pairs:
                target.copy_(source)
            return None
        # What is queued may still compute the source, or use memory that the target has taken over.
        self._stream.wait_stream(torch.accelerator.current_stream(self.device))
        with self._stream:
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def wait(self, copied: torch.Event | None) -> None:
        """Let the device, not the host, wait for a copy before it computes what is queued from now on."""
        if copied is not None:
            torch.accelerator.current_stream(self.device).wait_event(copied)

    def _new_page(self) -> Tensor:
        return torch.empty(_PAGE_BYTES, dtype=torch.uint8, pin_memory=self._stream is not None)
