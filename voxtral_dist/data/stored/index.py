"""The utterances of shard sets by number: their records and where their bytes are, without opening a tar."""

from __future__ import annotations

import bisect
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.data.stored.index_files import read_sets
from voxtral_dist.data.stored.layout import UtteranceLayout
from voxtral_dist.data.stored.shard_set import (
    RECORD,
    UNKNOWN_LANGUAGE,
    Ids,
    Records,
    Shard,
    ShardSet,
    language_numbers,
)
from voxtral_dist.data.stored.storage import Span, Storage, is_remote
from voxtral_dist.data.stored.tar_members import TAR_BLOCK_BYTES
from voxtral_dist.data.stored.utterance import StoredUtterance, parse_utterance
from voxtral_dist.errors import UserError


@dataclass(frozen=True)
class RecordChunk:
    """The records of consecutive utterances: `first_id`, `first_id + 1`, ...

    languages: positions in `ShardIndex.languages`, uint16 `(num_records,)`.
    """

    first_id: int
    records: Records
    languages: NDArray[np.uint16]


class ShardIndex:
    """The utterances of one or more shard sets, numbered from 0 in the order of sets, shards and tar members.

    Example:
        >>> from voxtral_dist import read_index
        >>> index = read_index(["shards/speech"])
        >>> len(index), index.languages
        (8, ('de', 'en', 'fr'))
        >>> index.language(0), float(index.duration_seconds[0])
        ('en', 2.594)
    """

    def __init__(self, sets: Sequence[ShardSet]) -> None:
        self.sets = tuple(sets)
        self.shards = tuple(shard for shard_set in self.sets for shard in shard_set.shards)
        self.languages = tuple(sorted({language for shard_set in self.sets for language in shard_set.languages}))
        self._language_numbers = [language_numbers(shard_set.languages, self.languages) for shard_set in self.sets]
        self._ends = np.cumsum([shard.num_utterances for shard in self.shards], dtype=np.int64)
        self._set_of_shard = np.repeat(np.arange(len(self.sets)), [len(shard_set.shards) for shard_set in self.sets])
        starts = self._ends - [shard.num_utterances for shard in self.shards]
        self._row_shift = np.concatenate([shard_set.first_rows for shard_set in self.sets]) - starts

    def __len__(self) -> int:
        return int(self._ends[-1])

    def gather(self, utterance_ids: Ids) -> Records:
        """The records of some utterances, `(n,)`, with languages as positions in `self.languages`."""
        shards = np.searchsorted(self._ends, utterance_ids, side="right")
        rows = utterance_ids + self._row_shift[shards]
        gathered = np.empty(len(utterance_ids), dtype=RECORD)
        for number, shard_set in enumerate(self.sets):
            here = self._set_of_shard[shards] == number
            gathered[here] = shard_set.records[rows[here]]
            gathered["language"][here] = self._language_numbers[number][gathered["language"][here]]
        return gathered

    def chunks(self, num_records: int = 2**20) -> Iterator[RecordChunk]:
        """All records in order, up to `num_records` at a time, as views of the memory maps."""
        for number, (first_shard, end_shard) in self._contiguous_shards():
            shard_set = self.sets[number]
            shard_set.advise(is_sequential=True)
            first_id = int(self._ends[first_shard]) - self.shards[first_shard].num_utterances
            end_id = int(self._ends[end_shard - 1])
            shift = int(self._row_shift[first_shard])
            for start in range(first_id, end_id, num_records):
                records = shard_set.records[start + shift : min(start + num_records, end_id) + shift]
                yield RecordChunk(start, records, self._language_numbers[number][records["language"]])
            shard_set.advise(is_sequential=False)

    @cached_property
    def records(self) -> Records:
        """All records as one array in memory, `(N,)`: for test sets and reports, not for 100 million utterances."""
        return self.gather(np.arange(len(self)))

    @property
    def duration_seconds(self) -> NDArray[np.float64]:
        """The durations of all utterances, `(N,)`, in memory."""
        return self.records["duration_ms"] / 1000.0

    def shard(self, utterance_id: int) -> Shard:
        """The tar that holds an utterance."""
        return self.shards[self._shard_number(utterance_id)]

    def span(self, utterance_id: int) -> Span:
        """The bytes of an utterance: a run of complete tar members."""
        record = self.record(utterance_id)
        offset, num_blocks = int(record["offset_blocks"]), int(record["num_blocks"])
        return Span(self.shard(utterance_id).location, offset * TAR_BLOCK_BYTES, num_blocks * TAR_BLOCK_BYTES)

    def find(self, span: Span) -> int | None:
        """The utterance that starts where a span starts; None if the index has none there."""
        for shard, end in zip(self.shards, self._ends_as_list, strict=True):
            if _is_same_file(shard.location, span.location):
                ids = np.arange(end - shard.num_utterances, end)
                found = np.flatnonzero(self.gather(ids)["offset_blocks"] == span.offset // TAR_BLOCK_BYTES)
                if len(found):
                    return int(ids[found[0]])
        return None

    def record(self, utterance_id: int) -> np.void:
        """The record of one utterance, with the language as a position in its own set's `languages`."""
        shard = self._shard_number(utterance_id)
        found: np.void = self.sets[self._set_of_shard[shard]].records[utterance_id + int(self._row_shift[shard])]
        return found

    def layout(self, utterance_id: int) -> UtteranceLayout:
        """The layout of an utterance's tar members."""
        return self._set_of(utterance_id).layout

    def parse(self, utterance_id: int, contents: bytes) -> StoredUtterance:
        """The utterance in the bytes of its span.

        Raises:
            ValueError, tarfile.TarError: the checksum differs from the index, or the bytes are not the tar members of
                one utterance with audio and text.
        """
        if zlib.crc32(contents) != int(self.record(utterance_id)["crc32"]):
            raise ValueError("has other bytes than when it was indexed (the checksum differs)")
        return parse_utterance(contents, self.layout(utterance_id))

    def language(self, utterance_id: int) -> str | None:
        """The ISO 639-1 code of an utterance's language; None if unknown."""
        number = int(self.record(utterance_id)["language"])
        return None if number == UNKNOWN_LANGUAGE else self._set_of(utterance_id).languages[number]

    def first(self, num_utterances: int) -> ShardIndex:
        """The index of the first `num_utterances` utterances."""
        sets, num_left = [], num_utterances
        for shard_set in self.sets:
            kept = []
            for shard in shard_set.shards:
                kept.append(replace(shard, num_utterances=min(num_left, shard.num_utterances)))
                num_left -= kept[-1].num_utterances
            sets.append(replace(shard_set, shards=tuple(kept)))
        return ShardIndex(sets)

    def _set_of(self, utterance_id: int) -> ShardSet:
        return self.sets[int(self._set_of_shard[self._shard_number(utterance_id)])]

    def _shard_number(self, utterance_id: int) -> int:
        # For a single number, ten times as fast as numpy's search.
        return bisect.bisect_right(self._ends_as_list, utterance_id)

    @cached_property
    def _ends_as_list(self) -> list[int]:
        ends: list[int] = self._ends.tolist()
        return ends

    def _contiguous_shards(self) -> Iterator[tuple[int, tuple[int, int]]]:
        """Runs of shards whose records are contiguous in one set: (set, (first shard, end of the shards))."""
        filled = np.array([shard.num_utterances > 0 for shard in self.shards])
        breaks = (np.diff(self._set_of_shard) != 0) | (np.diff(self._row_shift) != 0)
        edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(self.shards)]
        for first, end in pairwise(edges):
            if filled[first:end].any():
                yield int(self._set_of_shard[first]), (first, end)


def read_index(patterns: Sequence[str], storage: Storage | None = None) -> ShardIndex:
    """Read the index of one or more shard sets.

    Args:
        patterns: folders with an index, or URLs of such folders; globs and brace ranges of them; or patterns of tars in
            such a folder, which select a part of the set: `s3://bucket/set/set-{000000..000099}.tar`.
        storage: what reads them; None uses the default configuration.

    Raises:
        UserError: a folder is missing or has no index or no utterances, or a tar is missing or has another size than
            when it was indexed.

    Example:
        >>> from voxtral_dist import read_index
        >>> index = read_index(["shards/speech"])
        >>> len(index)
        8
    """
    return ShardIndex(read_sets(patterns, storage or Storage()))


def sets_by_name(shards: Sequence[str]) -> dict[str, str]:
    """Shard folders by the last part of their path or URL, which names the files of their results.

    Raises:
        UserError: two have the same name.
    """
    named = {
        shard_set.rstrip("/").rpartition("/")[2] if is_remote(shard_set) else Path(shard_set).resolve().name: shard_set
        for shard_set in shards
    }
    if len(named) < len(shards):
        raise UserError("Two shard folders have the same name, which names their results: evaluate them separately.")
    return named


def _is_same_file(location: str, other: str) -> bool:
    if is_remote(location) or is_remote(other):
        return location == other
    return Path(location).resolve() == Path(other).resolve()
