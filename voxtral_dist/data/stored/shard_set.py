"""The index of one shard set in memory: a fixed-size record per utterance and the list of its shards."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.data.stored.layout import UtteranceLayout

UNKNOWN_LANGUAGE = 2**16 - 1
# Larger counts are stored as this one: such a text is over any sensible limit anyway.
LARGEST_COUNT = 2**16 - 1

RECORD = np.dtype(
    [
        ("offset_blocks", "<u4"),  # start of the utterance's first tar header, in blocks of 512 bytes
        ("num_blocks", "<u4"),  # size of its headers and contents together, in blocks
        ("duration_ms", "<u4"),
        ("crc32", "<u4"),  # of these blocks
        ("num_text_tokens", "<u2"),  # by Voxtral's published vocabulary, without `</s>`
        ("num_chars", "<u2"),  # of the text
        ("language", "<u2"),  # position in the set's `languages`, or UNKNOWN_LANGUAGE
        ("num_instruction_tokens", "<u2"),  # by the same vocabulary; 0 for a transcription
    ]
)

Ids = NDArray[np.int64]
Records = NDArray[np.void]


@dataclass(frozen=True)
class Shard:
    """One tar file, with the size and the hash that it had when it was indexed.

    location: a local path, or a URL such as `s3://bucket/set/set-000000.tar`.
    """

    location: str
    num_utterances: int
    num_bytes: int
    sha256: str

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        return self.location.rpartition("/")[2]


@dataclass(frozen=True)
class ShardSet:
    """The index of one folder, or of some of its shards.

    records: one `RECORD` per utterance of the folder, in the order of the tars.
    first_rows: the row in `records` of each shard's first utterance, `(num_shards,)`.
    longest_seconds, most_text_tokens, most_instruction_tokens: maxima over all records of the folder.
    records_sha256: the hash of all records of the folder.
    """

    shards: tuple[Shard, ...]
    records: Records
    first_rows: Ids
    languages: tuple[str, ...]
    layout: UtteranceLayout
    longest_seconds: float
    most_text_tokens: int
    most_instruction_tokens: int
    records_sha256: str

    @property
    def num_utterances(self) -> int:
        """The number of utterances in `shards`."""
        return sum(shard.num_utterances for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """A hash of the layout, the records and the shards in their order."""
        identity = (self.records_sha256, self.layout, [shard.sha256 for shard in self.shards])
        return hashlib.sha256(repr(identity).encode()).hexdigest()

    def advise(self, is_sequential: bool) -> None:
        """Tell the kernel how mapped records will be read: for random reads, it must not read ahead 128 kB each."""
        base = self.records.base
        owner = base.base if isinstance(base, np.memmap) else base
        if isinstance(owner, mmap.mmap):
            owner.madvise(mmap.MADV_SEQUENTIAL if is_sequential else mmap.MADV_RANDOM)


def language_numbers(own: Sequence[str], merged: Sequence[str]) -> NDArray[np.uint16]:
    """A table `(65536,)` from positions in `own` to positions in `merged`; UNKNOWN_LANGUAGE maps to itself."""
    numbers = np.full(2**16, UNKNOWN_LANGUAGE, dtype=np.uint16)
    numbers[: len(own)] = [merged.index(language) for language in own]
    return numbers
