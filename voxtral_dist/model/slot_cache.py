"""Keys and values of utterances that are decoded together, each in a slot with a length of its own."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class BlockCache(Protocol):
    """What a block of the language model gives its new keys and values to, as to transformers' `Cache`."""

    def update(self, keys: Tensor, values: Tensor, block: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keep keys and values `(N, heads, T, head_dim)` of N rows, and return those to attend to."""


class SlotCache:
    """Keys and values of all blocks, for rows of up to `num_positions` tokens in each of `num_slots` slots.

    A row begins at position 0 of its slot. What lies behind its end is finite, so that a mask hides it.
    """

    def __init__(
        self,
        num_slots: int,
        num_positions: int,
        *,
        num_blocks: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_slots = num_slots
        self.num_positions = num_positions
        shape = (2, num_blocks, num_slots, num_positions, num_heads, head_dim)
        self._held = torch.zeros(shape, dtype=dtype, device=device)
        self.keys, self.values = (list(kind) for kind in self._held)

    def entering(self, first_slot: int) -> BlockCache:
        """A cache that writes prompts into the slots from `first_slot` on; they attend to nothing but themselves."""
        return _Entering(self, first_slot)

    def appending(self, positions: Tensor, num_attended: int) -> BlockCache:
        """A cache that writes one token at `positions` `(N,)` of the first N slots.

        Rows attend to the first `num_attended` positions; the caller masks those behind their ends.
        """
        return _Appending(self, positions, num_attended)

    def move(self, source: int, target: int, num_positions: int) -> None:
        """Copy the first positions of a slot to another one."""
        self._held[:, :, target, :num_positions] = self._held[:, :, source, :num_positions]


class _Entering:
    def __init__(self, cache: SlotCache, first_slot: int) -> None:
        self._cache = cache
        self._first_slot = first_slot

    def update(self, keys: Tensor, values: Tensor, block: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        slots = slice(self._first_slot, self._first_slot + len(keys))
        # A reference may be longer than any hypothesis.
        length = min(keys.shape[2], self._cache.num_positions)
        for new, held in ((keys, self._cache.keys[block]), (values, self._cache.values[block])):
            held[slots, :length] = new[:, :, :length].transpose(1, 2)
        return keys, values


class _Appending:
    def __init__(self, cache: SlotCache, positions: Tensor, num_attended: int) -> None:
        self._cache = cache
        self._num_rows = len(positions)
        self._num_attended = num_attended
        first_places = torch.arange(self._num_rows, device=positions.device) * cache.num_positions
        self._places = first_places + positions

    def update(self, keys: Tensor, values: Tensor, block: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return (
            self._append(keys, self._cache.keys[block]),
            self._append(values, self._cache.values[block]),
        )

    def _append(self, new: Tensor, held: Tensor) -> Tensor:
        held.flatten(0, 1).index_copy_(0, self._places, new[:, :, 0])
        return held[: self._num_rows, : self._num_attended].transpose(1, 2)
