"""What is in a shard set, without opening a tar: one fixed-size record per sample, and a small table of shards.

A shard set is a folder with `NAME-000000.tar`, ..., `index.npy` (one `RECORD` per sample in the order of the tars) and
`shards.json` (the shard table and the languages). The records are memory-mapped: all processes of a node share them
through the page cache, 16 bytes a sample.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.errors import UserError

INDEX_FILE = "index.npy"
SHARD_TABLE_FILE = "shards.json"
FORMAT_VERSION = 1
# Tar members start at multiples of this many bytes.
TAR_BLOCK_BYTES = 512
UNKNOWN_LANGUAGE = 255

RECORD = np.dtype(
    [
        ("offset_blocks", "<u4"),  # where the sample's first tar header starts, in blocks of 512 bytes
        ("num_blocks", "<u4"),  # its headers and contents together
        ("duration_ms", "<u4"),
        ("num_text_tokens", "<u2"),  # counted with Voxtral's published vocabulary, `</s>` not included
        ("language", "u1"),  # position in the table of languages, or UNKNOWN_LANGUAGE
        ("flags", "u1"),  # reserved, 0
    ]
)

Records = NDArray[np.void]


@dataclass(frozen=True)
class Shard:
    """One tar file: its path, how many samples it holds, and what it looked like when it was indexed."""

    path: Path
    num_samples: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class SampleSpan:
    """Where the tar members of one sample lie."""

    path: Path
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one or more shard sets, numbered from 0 in the order of the sets, shards and tar members."""

    shards: tuple[Shard, ...]
    records: Records
    languages: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum([shard.num_samples for shard in self.shards])

    @cached_property
    def duration_seconds(self) -> NDArray[np.float64]:
        """Of every sample, `(N,)`."""
        return self.records["duration_ms"] / 1000.0

    @property
    def fingerprint(self) -> str:
        """The same for the same shards in the same order, and practically no others."""
        joined = " ".join(shard.sha256 for shard in self.shards)
        return hashlib.sha256(joined.encode()).hexdigest()[:16]

    def span(self, sample_id: int) -> SampleSpan:
        """The bytes of a sample: a run of complete tar members."""
        record = self.records[sample_id]
        shard = self.shards[int(np.searchsorted(self._ends, sample_id, side="right"))]
        offset, num_blocks = int(record["offset_blocks"]), int(record["num_blocks"])
        return SampleSpan(shard.path, offset * TAR_BLOCK_BYTES, num_blocks * TAR_BLOCK_BYTES)

    def language(self, sample_id: int) -> str | None:
        """The ISO 639-1 code of a sample; None where it is not known."""
        number = int(self.records[sample_id]["language"])
        return None if number == UNKNOWN_LANGUAGE else self.languages[number]

    def first(self, num_samples: int) -> ShardIndex:
        """The index without the samples after the first `num_samples`."""
        return ShardIndex(self.shards, self.records[:num_samples], self.languages)


def write_index(folder: Path, shards: Sequence[Shard], records: Records, languages: Sequence[str]) -> None:
    """Write both files of the index; the shard table last, so that its presence says that the set is complete."""
    temporary = folder / f".{INDEX_FILE}.tmp.npy"
    np.save(temporary, records)
    temporary.replace(folder / INDEX_FILE)
    table = {
        "format": FORMAT_VERSION,
        "languages": list(languages),
        "num_samples": len(records),
        "duration_seconds": round(float(records["duration_ms"].sum(dtype=np.int64)) / 1000.0, 3),
        "shards": [asdict(shard) | {"path": shard.path.name} for shard in shards],
    }
    temporary = folder / f".{SHARD_TABLE_FILE}.tmp"
    temporary.write_text(json.dumps(table, indent=1, ensure_ascii=False), encoding="utf-8")
    temporary.replace(folder / SHARD_TABLE_FILE)


def read_index(folders: Sequence[Path]) -> ShardIndex:
    """The samples of all folders as one index.

    Raises:
        UserError: a folder is missing, holds no index or no samples, or a tar is missing or has another size than when
            it was indexed.
    """
    parts = [_read_folder(folder) for folder in folders]
    if len(parts) == 1:
        return parts[0]
    languages = tuple(sorted({language for part in parts for language in part.languages}))
    return ShardIndex(
        shards=tuple(shard for part in parts for shard in part.shards),
        records=np.concatenate([_renumber_languages(part, languages) for part in parts]),
        languages=languages,
    )


def _read_folder(folder: Path) -> ShardIndex:
    _check_files(folder)
    try:
        table, shards, records = _load_index(folder)
    except (ValueError, TypeError, KeyError, AttributeError, EOFError) as error:
        raise UserError(
            f"The index of {folder} is damaged ({SHARD_TABLE_FILE} or {INDEX_FILE}): pack the folder again."
        ) from error
    if len(records) == 0:
        raise UserError(
            f"The shard folder {folder} is empty: its index lists no samples. Pack some audio into it first."
        )
    if records.dtype != RECORD or len(records) != sum(shard.num_samples for shard in shards):
        raise UserError(
            f"The files {INDEX_FILE} and {SHARD_TABLE_FILE} in {folder} do not belong together: pack the folder again."
        )
    for shard in shards:
        _check_size(shard)
    return ShardIndex(shards, records, tuple(table["languages"]))


def _load_index(folder: Path) -> tuple[dict[str, Any], tuple[Shard, ...], Records]:
    table: dict[str, Any] = json.loads((folder / SHARD_TABLE_FILE).read_text(encoding="utf-8"))
    if table.get("format") != FORMAT_VERSION:
        raise UserError(
            f"The index of {folder} has format {table.get('format')!r}, but this version reads format "
            f"{FORMAT_VERSION}: pack the folder again."
        )
    shards = tuple(Shard(**(row | {"path": folder / row["path"]})) for row in table["shards"])
    return table, shards, np.load(folder / INDEX_FILE, mmap_mode="r")


def _check_files(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(
            f"The shard folder {folder} does not exist: make it by `voxtral-dist shards pack MANIFEST {folder}`, "
            "or correct the path in the configuration."
        )
    if not (folder / SHARD_TABLE_FILE).is_file() or not (folder / INDEX_FILE).is_file():
        what = (
            "is empty" if not any(folder.iterdir()) else f"has no complete index ({SHARD_TABLE_FILE} and {INDEX_FILE})"
        )
        raise UserError(f"The shard folder {folder} {what}: make it by `voxtral-dist shards pack MANIFEST {folder}`.")


def _check_size(shard: Shard) -> None:
    try:
        num_bytes = shard.path.stat().st_size
    except OSError as error:
        raise UserError(
            f"The shard {shard.path} cannot be read ({error.strerror}): its index still lists it."
        ) from error
    if num_bytes != shard.num_bytes:
        raise UserError(
            f"The shard {shard.path} has {num_bytes} bytes, but had {shard.num_bytes} when it was indexed: copy it "
            "again, or pack the folder again."
        )


def _renumber_languages(part: ShardIndex, languages: Sequence[str]) -> Records:
    numbers = np.full(256, UNKNOWN_LANGUAGE, dtype=np.uint8)
    numbers[: len(part.languages)] = [languages.index(language) for language in part.languages]
    records = np.array(part.records)
    records["language"] = numbers[records["language"]]
    return records
