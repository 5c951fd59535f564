"""What is in a shard set, without opening a tar: one fixed-size record per sample, and a small table of shards.

A shard set is a folder with `NAME-000000.tar`, ..., `index.npy` (one `RECORD` per sample in the order of the tars) and
`shards.json` (the shard table, the languages, and where text and audio are found in a sample). The records are
memory-mapped: all processes of a node share them through the page cache, 24 bytes a sample.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import mmap
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.data.stored.layout import TAR_BLOCK_BYTES, Sample, UtteranceLayout, parse_utterance
from voxtral_dist.data.stored.storage import Span, Storage, is_remote, join
from voxtral_dist.errors import UserError
from voxtral_dist.files import write_whole

INDEX_FILE = "index.npy"
SHARD_TABLE_FILE = "shards.json"
FORMAT_VERSION = 2
UNKNOWN_LANGUAGE = 2**16 - 1
# Longer texts are recorded as this long: such a sample is beyond every sensible limit anyway.
LARGEST_COUNT = 2**16 - 1

RECORD = np.dtype(
    [
        ("offset_blocks", "<u4"),  # where the sample's first tar header starts, in blocks of 512 bytes
        ("num_blocks", "<u4"),  # its headers and contents together
        ("duration_ms", "<u4"),
        ("crc32", "<u4"),  # of all these bytes
        ("num_text_tokens", "<u2"),  # counted with Voxtral's published vocabulary, `</s>` not included
        ("num_chars", "<u2"),  # of the text
        ("language", "<u2"),  # position in the table of languages, or UNKNOWN_LANGUAGE
        ("num_instruction_tokens", "<u2"),  # counted alike; 0 for a transcription
    ]
)

Ids = NDArray[np.int64]
Records = NDArray[np.void]


@dataclass(frozen=True)
class Shard:
    """One tar file: where it is, how many samples it holds, and what it looked like when it was indexed.

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

    first_rows: for each shard, the row of its first sample in `records`; `(num_shards,)`.
    longest_seconds, most_text_tokens, most_instruction_tokens: bounds on every record of the folder. records_sha256: of
    all its records.
    """

    shards: tuple[Shard, ...]
    records: Records
    first_rows: Ids
    languages: tuple[str, ...]
    members: UtteranceLayout
    longest_seconds: float
    most_text_tokens: int
    most_instruction_tokens: int
    records_sha256: str

    @property
    def fingerprint(self) -> str:
        """The same for the same shards and records in the same order, and practically no others."""
        known = (self.records_sha256, self.members, [shard.sha256 for shard in self.shards])
        return hashlib.sha256(repr(known).encode()).hexdigest()


@dataclass(frozen=True)
class RecordChunk:
    """Records of neighbouring samples: `first_id`, `first_id + 1`, ...

    languages: their positions in the languages of the whole index, uint16 `(num_records,)`.
    """

    first_id: int
    records: Records
    languages: NDArray[np.uint16]


class ShardIndex:
    """The samples of one or more shard sets, numbered from 0 in the order of the sets, shards and tar members."""

    def __init__(self, sets: Sequence[ShardSet]) -> None:
        self.sets = tuple(sets)
        self.shards = tuple(shard for part in self.sets for shard in part.shards)
        self.languages = tuple(sorted({language for part in self.sets for language in part.languages}))
        self._renumbered = [language_numbers(part.languages, self.languages) for part in self.sets]
        self._ends = np.cumsum([shard.num_utterances for shard in self.shards], dtype=np.int64)
        self._set_of_shard = np.repeat(np.arange(len(self.sets)), [len(part.shards) for part in self.sets])
        starts = self._ends - [shard.num_utterances for shard in self.shards]
        self._row_shift = np.concatenate([part.first_rows for part in self.sets]) - starts

    def __len__(self) -> int:
        return int(self._ends[-1])

    def gather(self, utterance_ids: Ids) -> Records:
        """The records of some samples, `(n,)`, with languages as positions in `self.languages`."""
        shards = np.searchsorted(self._ends, utterance_ids, side="right")
        rows = utterance_ids + self._row_shift[shards]
        gathered = np.empty(len(utterance_ids), dtype=RECORD)
        for number, part in enumerate(self.sets):
            here = self._set_of_shard[shards] == number
            gathered[here] = part.records[rows[here]]
            gathered["language"][here] = self._renumbered[number][gathered["language"][here]]
        return gathered

    def chunks(self, num_records: int = 2**20) -> Iterator[RecordChunk]:
        """All records in order, some at a time, as views of the memory maps."""
        for number, (first_shard, end_shard) in self._neighbouring_shards():
            part = self.sets[number]
            _will_be_read(part.records, in_order=True)
            first_id = int(self._ends[first_shard]) - self.shards[first_shard].num_utterances
            end_id = int(self._ends[end_shard - 1])
            shift = int(self._row_shift[first_shard])
            for start in range(first_id, end_id, num_records):
                records = part.records[start + shift : min(start + num_records, end_id) + shift]
                yield RecordChunk(start, records, self._renumbered[number][records["language"]])
            _will_be_read(part.records, in_order=False)

    @cached_property
    def records(self) -> Records:
        """Of all samples, as one array in memory: for test sets and reports, not for 100 million samples."""
        return self.gather(np.arange(len(self)))

    @property
    def duration_seconds(self) -> NDArray[np.float64]:
        """Of all samples, `(N,)`, in memory."""
        return self.records["duration_ms"] / 1000.0

    def shard(self, utterance_id: int) -> Shard:
        """The tar that holds a sample."""
        return self.shards[self._shard_number(utterance_id)]

    def span(self, utterance_id: int) -> Span:
        """The bytes of a sample: a run of complete tar members."""
        record = self.record(utterance_id)
        offset, num_blocks = int(record["offset_blocks"]), int(record["num_blocks"])
        return Span(self.shard(utterance_id).location, offset * TAR_BLOCK_BYTES, num_blocks * TAR_BLOCK_BYTES)

    def find(self, span: Span) -> int | None:
        """The sample that is stored at a span; None where the index does not have it."""
        for shard, end in zip(self.shards, self._ends_as_list, strict=True):
            if _is_same_place(shard.location, span.location):
                ids = np.arange(end - shard.num_utterances, end)
                there = np.flatnonzero(self.gather(ids)["offset_blocks"] == span.offset // TAR_BLOCK_BYTES)
                if len(there):
                    return int(ids[there[0]])
        return None

    def record(self, utterance_id: int) -> np.void:
        """The record of one sample, with the language as its own set numbers it."""
        shard = self._shard_number(utterance_id)
        found: np.void = self.sets[self._set_of_shard[shard]].records[utterance_id + int(self._row_shift[shard])]
        return found

    def members(self, utterance_id: int) -> UtteranceLayout:
        """How the sample is laid out."""
        return self._set_of(utterance_id).members

    def parse(self, utterance_id: int, contents: bytes) -> Sample:
        """The sample in the bytes of its span.

        Raises:
            ValueError, tarfile.TarError: they are not those that were indexed, or are not the tar members of one sample
                with audio and text.
        """
        if zlib.crc32(contents) != int(self.record(utterance_id)["crc32"]):
            raise ValueError("these are not the bytes that were indexed (the checksum differs)")
        return parse_utterance(contents, self.members(utterance_id))

    def language(self, utterance_id: int) -> str | None:
        """The ISO 639-1 code of a sample; None where it is not known."""
        number = int(self.record(utterance_id)["language"])
        return None if number == UNKNOWN_LANGUAGE else self._set_of(utterance_id).languages[number]

    def first(self, num_utterances: int) -> ShardIndex:
        """The index without the samples after the first `num_utterances`."""
        sets, left = [], num_utterances
        for part in self.sets:
            kept = []
            for shard in part.shards:
                kept.append(replace(shard, num_utterances=min(left, shard.num_utterances)))
                left -= kept[-1].num_utterances
            sets.append(replace(part, shards=tuple(kept)))
        return ShardIndex(sets)

    def _set_of(self, utterance_id: int) -> ShardSet:
        return self.sets[int(self._set_of_shard[self._shard_number(utterance_id)])]

    def _shard_number(self, utterance_id: int) -> int:
        # For one number, this is ten times as fast as numpy's search.
        return bisect.bisect_right(self._ends_as_list, utterance_id)

    @cached_property
    def _ends_as_list(self) -> list[int]:
        ends: list[int] = self._ends.tolist()
        return ends

    def _neighbouring_shards(self) -> Iterator[tuple[int, tuple[int, int]]]:
        """Runs of shards whose records are neighbours in one memory map: (set, first and end of the shards)."""
        filled = np.array([shard.num_utterances > 0 for shard in self.shards])
        breaks = (np.diff(self._set_of_shard) != 0) | (np.diff(self._row_shift) != 0)
        edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(self.shards)]
        for first, end in pairwise(edges):
            if filled[first:end].any():
                yield int(self._set_of_shard[first]), (first, end)


def write_index(
    folder: Path,
    shards: Sequence[Shard],
    records: Records,
    languages: Sequence[str],
    members: UtteranceLayout | None = None,
) -> None:
    """Write both files of the index; the shard table last, so that its presence says that the set is complete."""
    temporary = folder / f".{INDEX_FILE}.tmp.npy"
    np.save(temporary, records)
    temporary.replace(folder / INDEX_FILE)
    table = {
        "format": FORMAT_VERSION,
        "languages": list(languages),
        "members": (members or UtteranceLayout()).to_json(),
        "num_utterances": len(records),
        "duration_seconds": round(float(records["duration_ms"].sum(dtype=np.int64)) / 1000.0, 3),
        "longest_seconds": float(records["duration_ms"].max(initial=0)) / 1000.0,
        "most_text_tokens": int(records["num_text_tokens"].max(initial=0)),
        "most_instruction_tokens": int(records["num_instruction_tokens"].max(initial=0)),
        "records_sha256": hashlib.sha256(np.ascontiguousarray(records).data).hexdigest(),
        "shards": [asdict(shard) | {"location": _relative(shard, folder)} for shard in shards],
    }
    write_whole(folder / SHARD_TABLE_FILE, json.dumps(table, indent=1, ensure_ascii=False))


def read_index(patterns: Sequence[str], storage: Storage | None = None) -> ShardIndex:
    """The samples of all shard sets as one index.

    Args:
        patterns: folders or URLs of folders with an index; globs and brace ranges of them; or patterns of tars in such
            a folder, which select a part of the set: `s3://bucket/set/set-{000000..000099}.tar`.
        storage: what reads them; None reads as the default configuration says.

    Raises:
        UserError: a folder is missing, holds no index or no samples, or a tar is missing or has another size than when
            it was indexed.
    """
    return ShardIndex(read_sets(patterns, storage or Storage()))


def read_sets(patterns: Sequence[str], storage: Storage) -> list[ShardSet]:
    """The shard sets of all patterns; see `read_index`."""
    return [part for pattern in patterns for part in _sets_of(str(pattern), storage)]


def refuse_unusable(name: str, parts: Sequence[ShardSet]) -> None:
    """Refuse what cannot be one training set.

    Raises:
        UserError: there are no samples in it, or the same shard is in it twice.
    """
    locations = [shard.location for part in parts for shard in part.shards]
    twice = next((location for location, count in Counter(locations).items() if count > 1), None)
    where = "`train_data.shards`" if name == "all" else f"`train_data.sets.{name}`"
    if twice is not None:
        raise UserError(
            f"{where}: the shard {twice} is named by two patterns, so that its samples would be drawn twice: make them "
            "exclude each other. To draw a set more often, give it a weight in `train_data.sets`."
        )
    if not any(shard.num_utterances for part in parts for shard in part.shards):
        raise UserError(f"{where}: its shards hold no samples: correct the patterns.")


def _sets_of(pattern: str, storage: Storage) -> list[ShardSet]:
    if not pattern.endswith(".tar"):
        return [_read_folder(folder.rstrip("/"), storage) for folder in storage.expand(pattern)]
    names_by_folder: dict[str, set[str]] = {}
    for location in storage.expand(pattern):
        folder, _, name = location.rpartition("/")
        names_by_folder.setdefault(folder or ".", set()).add(name)
    return [_only(_read_folder(folder, storage), names, folder) for folder, names in names_by_folder.items()]


def _only(part: ShardSet, names: set[str], folder: str) -> ShardSet:
    unknown = sorted(names - {shard.name for shard in part.shards})
    if unknown:
        raise UserError(
            f"The index of {folder} doesn't know the shard {unknown[0]}: index the folder again, or correct the "
            "pattern."
        )
    kept = [number for number, shard in enumerate(part.shards) if shard.name in names]
    return replace(part, shards=tuple(part.shards[number] for number in kept), first_rows=part.first_rows[kept])


def _read_folder(folder: str, storage: Storage) -> ShardSet:
    sizes = _sizes(folder, storage)
    try:
        part = _load_set(folder, storage)
    except (ValueError, TypeError, KeyError, AttributeError, EOFError) as error:
        raise UserError(
            f"The index of {folder} is damaged ({SHARD_TABLE_FILE} or {INDEX_FILE}): pack or index the folder again."
        ) from error
    if len(part.records) == 0:
        raise UserError(
            f"The shard folder {folder} is empty: its index lists no samples. Pack some audio into it first."
        )
    if part.records.dtype != RECORD or len(part.records) != sum(shard.num_utterances for shard in part.shards):
        raise UserError(
            f"The files {INDEX_FILE} and {SHARD_TABLE_FILE} in {folder} do not belong together: pack or index the "
            "folder again."
        )
    for shard in part.shards:
        _check_size(shard, folder, sizes)
    return part


def _load_set(folder: str, storage: Storage) -> ShardSet:
    table: dict[str, Any] = json.loads(storage.read_all(join(folder, SHARD_TABLE_FILE)))
    if table.get("format") != FORMAT_VERSION:
        raise UserError(
            f"The index of {folder} has format {table.get('format')!r}, but this version reads format "
            f"{FORMAT_VERSION}: make it again by `voxtral-dist shards index {folder}`."
        )
    shards = tuple(Shard(**(row | {"location": _absolute(row["location"], folder)})) for row in table["shards"])
    counts = [shard.num_utterances for shard in shards]
    records = _as_named_now(np.load(storage.local_copy(join(folder, INDEX_FILE)), mmap_mode="r"))
    _will_be_read(records, in_order=False)
    return ShardSet(
        shards=shards,
        records=records,
        first_rows=np.cumsum([0, *counts[:-1]], dtype=np.int64),
        languages=tuple(table["languages"]),
        members=UtteranceLayout.from_json(table["members"]),
        longest_seconds=float(table["longest_seconds"]),
        most_text_tokens=int(table["most_text_tokens"]),
        # Indices from before there were instructions have no such key.
        most_instruction_tokens=int(table.get("most_instruction_tokens", 0)),
        records_sha256=str(table["records_sha256"]),
    )


def _as_named_now(records: Records) -> Records:
    """Records in which the last field was reserved, and 0, have the layout of today."""
    if (records.dtype.names or ())[-1:] == ("flags",) and records.dtype.itemsize == RECORD.itemsize:
        return records.view(RECORD)
    return records


def _sizes(folder: str, storage: Storage) -> dict[str, int] | None:
    """The files of a folder and their sizes; None where a server does not list them."""
    try:
        sizes = storage.sizes(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"The shard folder {folder} does not exist: make it by `voxtral-dist shards pack SOURCE {folder}`, "
            "or correct the path in the configuration."
        ) from error
    if not sizes and is_remote(folder):
        return None
    if not {SHARD_TABLE_FILE, INDEX_FILE} <= sizes.keys():
        what = f"has no complete index ({SHARD_TABLE_FILE} and {INDEX_FILE})" if sizes else "is empty"
        raise UserError(
            f"The shard folder {folder} {what}: make it by `voxtral-dist shards pack SOURCE {folder}`, or index its "
            f"tars by `voxtral-dist shards index {folder}`."
        )
    return sizes


def _check_size(shard: Shard, folder: str, sizes: dict[str, int] | None) -> None:
    if sizes is None or shard.location != join(folder, shard.name):
        return
    num_bytes = sizes.get(shard.name)
    if num_bytes is None:
        raise UserError(f"The shard {shard.location} is missing: the index of its folder still lists it.")
    if num_bytes != shard.num_bytes:
        raise UserError(
            f"The shard {shard.location} has {num_bytes} bytes, but had {shard.num_bytes} when it was indexed: copy it "
            "again, or pack or index the folder again."
        )


def _will_be_read(records: Records, in_order: bool) -> None:
    """Tell the kernel: records that are drawn at random would each read 128 kB of their neighbours from a cold disk."""
    owner = records.base.base if isinstance(records.base, np.memmap) else records.base
    if isinstance(owner, mmap.mmap):
        owner.madvise(mmap.MADV_SEQUENTIAL if in_order else mmap.MADV_RANDOM)


def _is_same_place(location: str, other: str) -> bool:
    if is_remote(location) or is_remote(other):
        return location == other
    return Path(location).resolve() == Path(other).resolve()


def _relative(shard: Shard, folder: Path) -> str:
    return shard.name if shard.location == join(str(folder), shard.name) else shard.location


def _absolute(location: str, folder: str) -> str:
    return location if "/" in location else join(folder, location)


def language_numbers(own: Sequence[str], merged: Sequence[str]) -> NDArray[np.uint16]:
    """The position in `merged` of each position in `own`; unknown ones stay unknown. `(65536,)`."""
    numbers = np.full(2**16, UNKNOWN_LANGUAGE, dtype=np.uint16)
    numbers[: len(own)] = [merged.index(language) for language in own]
    return numbers
