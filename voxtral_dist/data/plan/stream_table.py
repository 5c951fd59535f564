"""A table that finds the k-th utterance of a stream in one byte per utterance."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.data.stored.shard_set import Ids

# The number of the stream that holds no utterance: those that are skipped.
SKIPPED = 255
_BLOCK_UTTERANCES = 1024


class StreamTable:
    """Finds utterances by their position in a stream, from the number of utterances of each stream in each block."""

    def __init__(self, stream_of_utterance: NDArray[np.uint8], num_streams: int) -> None:
        """Count the blocks of `stream_of_utterance`, `(N,)`: the stream of each utterance, or `SKIPPED`."""
        whole = len(stream_of_utterance) - len(stream_of_utterance) % _BLOCK_UTTERANCES
        self._blocks = stream_of_utterance[:whole].reshape(-1, _BLOCK_UTTERANCES)
        # The incomplete last block is padded on its own, so that the large array need not be copied.
        self._last = np.full(_BLOCK_UTTERANCES, SKIPPED, dtype=np.uint8)
        self._last[: len(stream_of_utterance) - whole] = stream_of_utterance[whole:]
        self._ends = [np.cumsum(self._counts(stream)) for stream in range(num_streams)]

    def find(self, stream: int, positions: NDArray[np.int64]) -> Ids:
        """The utterances at the given positions of a stream, `(n,)`."""
        ends = self._ends[stream]
        blocks = np.searchsorted(ends, positions, side="right")
        inside = positions - np.where(blocks > 0, ends[blocks - 1], 0)
        found = np.empty(len(positions), dtype=np.int64)
        # In parts, so that a large megabatch does not need the memory for all its blocks at once.
        for part in np.array_split(np.arange(len(positions)), -(-len(positions) // 4096) or 1):
            ranks = np.cumsum(self._rows(blocks[part]) == stream, axis=1, dtype=np.uint16)
            found[part] = (ranks <= inside[part, None]).sum(axis=1)
        utterance_ids: Ids = blocks * _BLOCK_UTTERANCES + found
        return utterance_ids

    def are_in_streams(self, first_id: int, num_utterances: int) -> NDArray[np.bool_]:
        """Whether each of some consecutive utterances is in any stream, `(num_utterances,)`."""
        end, num_whole = first_id + num_utterances, self._blocks.size
        whole = self._blocks.reshape(-1)[first_id:end]
        last = self._last[max(0, first_id - num_whole) : max(0, end - num_whole)]
        are_there: NDArray[np.bool_] = np.concatenate([whole, last]) != SKIPPED
        return are_there

    def _rows(self, blocks: NDArray[np.int64]) -> NDArray[np.uint8]:
        is_last = blocks == len(self._blocks)
        rows = np.empty((len(blocks), _BLOCK_UTTERANCES), dtype=np.uint8)
        rows[~is_last] = self._blocks[blocks[~is_last]]
        rows[is_last] = self._last
        return rows

    def _counts(self, stream: int) -> NDArray[np.int64]:
        parts = [*np.array_split(self._blocks, len(self._blocks) // 4096 + 1), self._last[None]]
        counts: NDArray[np.int64] = np.concatenate([(part == stream).sum(axis=1, dtype=np.int64) for part in parts])
        return counts
