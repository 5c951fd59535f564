"""Shard sets without audio: an index of any number of samples, beside tars that have their size and no contents.

The order of training is planned from the index alone, so that is all it takes to measure plans.
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
    """A set of samples with these durations in seconds and these numbers of tokens."""

    def fill(records: Records, first: int) -> None:
        some = slice(first, first + len(records))
        records["duration_ms"] = np.rint(durations[some] * 1000)
        records["num_text_tokens"] = text_tokens[some]

    return write_generated_set(folder, len(durations), fill, utterances_per_shard)


def write_generated_set(
    folder: Path,
    num_utterances: int,
    fill: Callable[[Records, int], None],
    utterances_per_shard: int = UTTERANCES_PER_SHARD,
) -> Path:
    """A set of any size: `fill` writes duration and tokens into some records, given the number of the first."""
    folder.mkdir(parents=True)
    records = np.lib.format.open_memmap(folder / f"new-{INDEX_FILE}", mode="w+", dtype=RECORD, shape=(num_utterances,))
    shards = []
    for number, first in enumerate(range(0, num_utterances, utterances_per_shard)):
        in_shard = records[first : first + utterances_per_shard]
        for start in range(0, len(in_shard), _CHUNK):
            fill(in_shard[start : start + _CHUNK], first + start)
        shards.append(_lay_out(in_shard, folder / f"bare-{number:06d}.tar"))
    write_index(folder, shards, records, ["en"])
    (folder / f"new-{INDEX_FILE}").unlink()
    return folder


def _lay_out(records: Records, tar: Path) -> Shard:
    records["num_blocks"] = 4 + records["duration_ms"] // 1000 * _BLOCKS_PER_SECOND
    ends = np.cumsum(records["num_blocks"], dtype=np.int64)
    records["offset_blocks"] = ends - records["num_blocks"]
    num_bytes = int(ends[-1]) * 512
    with tar.open("wb") as file:
        # A file with a hole takes no room on the disk.
        file.truncate(num_bytes)
    return Shard(str(tar), len(records), num_bytes, tar.name)
