"""Host memory of a rank by kind, as it is allocated and freed: pinned by torch's caching allocator, or pageable."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

# Kind of pinned blocks that are free, but not returned to the system.
CACHED = "cached"


@dataclass(frozen=True)
class Block:
    """Pinned memory: its kind, what was asked for, and its size, in bytes."""

    kind: str
    num_bytes: int
    size: int


class PinnedPool:
    """The blocks of torch's allocator of pinned memory (`ATen/core/CachingHostAllocator.h` of torch 2.13) as numbers.

    A block has the next power of two of what is asked for. A free one is kept, and serves the next request of its size.
    Above `max_cached`, the option `pinned_max_cached_size_mb`, a block has exactly the bytes that are asked for, and
    goes back to the system when it is freed.
    """

    def __init__(self, max_cached: int | None) -> None:
        self._max_cached = max_cached
        self._cached: Counter[int] = Counter()

    @property
    def cached_bytes(self) -> int:
        """Bytes of blocks that are kept."""
        return sum(size * count for size, count in self._cached.items())

    def block_bytes(self, num_bytes: int) -> int:
        """Size of the block for this many bytes."""
        if num_bytes == 0 or self._exceeds_cache(num_bytes):
            return num_bytes
        return 1 << (num_bytes - 1).bit_length()

    def allocate(self, num_bytes: int) -> int:
        """Take a block, a kept one if there is one; returns its size."""
        size = self.block_bytes(num_bytes)
        if self._cached[size]:
            self._cached[size] -= 1
        return size

    def free(self, size: int) -> None:
        """Give a block back."""
        if not self._exceeds_cache(size):
            self._cached[size] += 1

    def empty(self) -> None:
        """Return all blocks that are kept to the system, as `torch.accelerator.empty_host_cache` does."""
        self._cached.clear()

    def _exceeds_cache(self, num_bytes: int) -> bool:
        return self._max_cached is not None and num_bytes > self._max_cached


@dataclass
class HostLedger:
    """What a rank holds in host memory, and its peak.

    pool: None where pinning does nothing, on CPUs. held: bytes by kind, without what the pool keeps. peak: bytes by
    kind when the sum was largest. pinned: bytes of everything that was pinned, in order. peak_pinned_bytes: the most
    that `pinned_bytes` was.
    """

    pool: PinnedPool | None
    held: Counter[str] = field(default_factory=Counter)
    peak: dict[str, int] = field(default_factory=dict)
    pinned: list[int] = field(default_factory=list)
    peak_pinned_bytes: int = 0
    _used: int = 0

    @property
    def pinned_bytes(self) -> int:
        """Bytes of pinned blocks, those that the pool keeps among them."""
        return self._used + (self.pool.cached_bytes if self.pool is not None else 0)

    def hold(self, kind: str, num_bytes: int) -> None:
        """Allocate pageable memory, and write to it."""
        self.held[kind] += num_bytes
        self._note_peak()

    def drop(self, kind: str, num_bytes: int) -> None:
        """Free pageable memory."""
        self.held[kind] -= num_bytes

    def pin(self, kind: str, num_bytes: int, *, from_pageable: bool) -> Block:
        """Pin memory.

        Args:
            kind: what it holds.
            num_bytes: that are asked for.
            from_pageable: whether its contents were written to pageable memory, which is freed afterwards.
        """
        self.pinned.append(num_bytes)
        if self.pool is None:
            self.hold(kind, num_bytes)
            return Block(kind, num_bytes, num_bytes)
        if from_pageable:
            self.hold("buffers", num_bytes)
        block = Block(kind, num_bytes, self.pool.allocate(num_bytes))
        self._used += block.size
        self.peak_pinned_bytes = max(self.peak_pinned_bytes, self.pinned_bytes)
        self.hold(kind, block.size)
        if from_pageable:
            self.drop("buffers", num_bytes)
        return block

    def unpin(self, block: Block) -> None:
        """Free pinned memory."""
        self.held[block.kind] -= block.size
        if self.pool is not None:
            self._used -= block.size
            self.pool.free(block.size)

    def return_cached(self) -> None:
        """Return what the pool keeps to the system."""
        if self.pool is not None:
            self.pool.empty()

    def now(self) -> dict[str, int]:
        """Bytes by kind."""
        cached = {CACHED: self.pool.cached_bytes} if self.pool is not None else {}
        return {kind: size for kind, size in (self.held | cached).items() if size}

    def _note_peak(self) -> None:
        now = self.now()
        if sum(now.values()) > sum(self.peak.values()):
            self.peak = now
