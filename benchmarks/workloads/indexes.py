"""Shard sets without audio: an index of any number of utterances, and sparse tars of the right size.

The order of training is planned from the index alone, so this is enough to measure plans.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.data.stored.index_files import INDEX_FILE, write_index
from voxtral_dist.data.stored.shard_set import RECORD, Records, Shard

UTTERANCES_PER_SHARD = 1_000_000
_BLOCKS_PER_SECOND = 32
_CHUNK = 1_000_000


def write_bare_set(
    folder: Path, durations: NDArray[np.float64], text_tokens: NDArray[np.int64], utterances_per_shard: int = 1000
) -> Path:
    """Write a set of utterances with these durations in seconds and numbers of text tokens; return its folder."""

    def fill(records: Records, first: int) -> None:
        rows = slice(first, first + len(records))
        records["duration_ms"] = np.rint(durations[rows] * 1000)
        records["num_text_tokens"] = text_tokens[rows]

    return write_generated_set(folder, len(durations), fill, utterances_per_shard)


def write_generated_set(
    folder: Path,
    num_utterances: int,
    fill: Callable[[Records, int], None],
    utterances_per_shard: int = UTTERANCES_PER_SHARD,
) -> Path:
    """Write a set of any size; `fill(records, first)` sets durations and tokens of records that start at `first`."""
    folder.mkdir(parents=True)
    records = np.lib.format.open_memmap(folder / f"new-{INDEX_FILE}", mode="w+", dtype=RECORD, shape=(num_utterances,))
    shards = []
    for number, first in enumerate(range(0, num_utterances, utterances_per_shard)):
        in_shard = records[first : first + utterances_per_shard]
        for start in range(0, len(in_shard), _CHUNK):
            fill(in_shard[start : start + _CHUNK], first + start)
        shards.append(_write_sparse_tar(in_shard, folder / f"bare-{number:06d}.tar"))
    write_index(folder, shards, records, ["en"])
    (folder / f"new-{INDEX_FILE}").unlink()
    return folder


def _write_sparse_tar(records: Records, tar: Path) -> Shard:
    records["num_blocks"] = 4 + records["duration_ms"] // 1000 * _BLOCKS_PER_SECOND
    ends = np.cumsum(records["num_blocks"], dtype=np.int64)
    records["offset_blocks"] = ends - records["num_blocks"]
    num_bytes = int(ends[-1]) * 512
    with tar.open("wb") as file:
        # A sparse file takes no disk space.
        file.truncate(num_bytes)
    return Shard(str(tar), len(records), num_bytes, tar.name)
