"""Keys and values of utterances that are decoded together, each in a row with a length of its own."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class BlockCache(Protocol):
    """What a block of the language model gives its new keys and values to, as to transformers' `Cache`."""

    def update(self, keys: Tensor, values: Tensor, block: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keep keys and values `(N, heads, T, head_dim)` of N rows, and return those to attend to."""


class RowCache:
    """Keys and values of all blocks, for up to `num_positions` tokens in each of `num_rows` rows.

    Tokens begin at position 0 of a row. What lies behind the last one is finite, so that a mask hides it.
    """

    def __init__(
        self,
        num_rows: int,
        num_positions: int,
        *,
        num_blocks: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_rows = num_rows
        self.num_positions = num_positions
        shape = (2, num_blocks, num_rows, num_positions, num_heads, head_dim)
        self._held = torch.zeros(shape, dtype=dtype, device=device)
        self.keys, self.values = (list(kind) for kind in self._held)

    def entering(self, first_row: int) -> BlockCache:
        """A cache that writes prompts into the rows from `first_row` on; they attend to nothing but themselves."""
        return _Entering(self, first_row)

    def appending(self, positions: Tensor, num_attended: int) -> BlockCache:
        """A cache that writes one token at `positions` `(N,)` of the first N rows.

        These attend to their first `num_attended` positions; the caller masks those behind the new token.
        """
        return _Appending(self, positions, num_attended)

    def move(self, source: int, target: int, num_positions: int) -> None:
        """Copy the first positions of a row to another one."""
        self._held[:, :, target, :num_positions] = self._held[:, :, source, :num_positions]


class _Entering:
    def __init__(self, cache: RowCache, first_row: int) -> None:
        self._cache = cache
        self._first_row = first_row

    def update(self, keys: Tensor, values: Tensor, block: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        rows = slice(self._first_row, self._first_row + len(keys))
        # A reference may be longer than any hypothesis.
        length = min(keys.shape[2], self._cache.num_positions)
        for new, held in ((keys, self._cache.keys[block]), (values, self._cache.values[block])):
            held[rows, :length] = new[:, :, :length].transpose(1, 2)
        return keys, values


class _Appending:
    def __init__(self, cache: RowCache, positions: Tensor, num_attended: int) -> None:
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
