"""The two files of an index: `index.npy` with the records, and `shards.json` with the shard table.

A shard set is a folder with `NAME-000000.tar`, ..., `index.npy` (one `RECORD` per utterance in the order of the tars)
and `shards.json` (the shards, the languages and the layout of an utterance). The records are memory-mapped: all
processes of a node share them through the page cache, 24 bytes per utterance.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt

from voxtral_dist.data.stored.layout import UtteranceLayout
from voxtral_dist.data.stored.shard_set import LARGEST_COUNT, RECORD, Records, Shard, ShardSet
from voxtral_dist.data.stored.storage import Storage, is_remote, is_unreachable, join, local_path
from voxtral_dist.errors import ReadError, UserError, first_line
from voxtral_dist.files import write_atomically
from voxtral_dist.output.counting import counted
from voxtral_dist.output.masking import masked
from voxtral_dist.text.json_text import json_checksum

INDEX_FILE = "index.npy"
SHARD_TABLE_FILE = "shards.json"
# 4: the table has a checksum of its own. 3: it has none.
FORMAT_VERSION = 4
_READ_FORMATS = (3, 4)
_CHECKSUM = "checksum"


def write_index(
    folder: Path,
    shards: Sequence[Shard],
    records: Records,
    languages: Sequence[str],
    layout: UtteranceLayout | None = None,
) -> None:
    """Write both files of an index; the shard table comes last, so that it marks the set as complete."""
    temporary = folder / f".{INDEX_FILE}.tmp.npy"
    np.save(temporary, records)
    temporary.replace(folder / INDEX_FILE)
    table: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "languages": list(languages),
        "layout": (layout or UtteranceLayout()).to_json(),
        "num_utterances": len(records),
        "duration_seconds": round(float(records["duration_ms"].sum(dtype=np.int64)) / 1000.0, 3),
        "longest_seconds": float(records["duration_ms"].max(initial=0)) / 1000.0,
        "most_text_tokens": int(records["num_text_tokens"].max(initial=0)),
        "most_instruction_tokens": int(records["num_instruction_tokens"].max(initial=0)),
        "records_sha256": hashlib.sha256(np.ascontiguousarray(records).data).hexdigest(),
        "shards": [asdict(shard) | {"location": _relative(shard, folder)} for shard in shards],
    }
    table[_CHECKSUM] = json_checksum(table)
    write_atomically(folder / SHARD_TABLE_FILE, json.dumps(table, indent=1, ensure_ascii=False))


def read_sets(patterns: Sequence[str], storage: Storage, *, anew: bool = False) -> list[ShardSet]:
    """The shard sets that patterns match; arguments and errors as of `read_index`.

    `anew` compares the records with their checksum even where this node did so since they changed.
    """
    return [shard_set for pattern in patterns for shard_set in _sets_of(str(pattern), storage, anew)]


def refuse_missing_sets(patterns: Sequence[str]) -> None:
    """Refuse local patterns that lead to no shard set, without reading an index.

    Raises:
        UserError: a folder does not exist, or has no index.
    """
    storage = Storage()
    for pattern in (str(pattern) for pattern in patterns if not is_remote(str(pattern))):
        found = _expanded(pattern, storage)
        of_tars = pattern.endswith(".tar")
        for folder in dict.fromkeys((one.rpartition("/")[0] or ".") if of_tars else one.rstrip("/") for one in found):
            if not all((local_path(folder) / name).is_file() for name in (SHARD_TABLE_FILE, INDEX_FILE)):
                # It says what is missing.
                _sizes(folder, storage)


def check_train_shards(name: str, shard_sets: Sequence[ShardSet]) -> None:
    """Check that shard sets can be one training set.

    Raises:
        UserError: they hold no utterances, or the same shard twice.
    """
    locations = [shard.location for shard_set in shard_sets for shard in shard_set.shards]
    repeated = next((location for location, count in Counter(locations).items() if count > 1), None)
    where = "`train_data.shards`" if name == "all" else f"`train_data.sets.{name}`"
    if repeated is not None:
        raise UserError(
            f"{where}: two patterns match the shard {repeated}, so its utterances would be used twice per epoch. "
            "Change the patterns so that they don't overlap. To use a set more often, give it a weight in "
            "`train_data.sets`."
        )
    if not any(shard_set.num_utterances for shard_set in shard_sets):
        raise UserError(f"{where}: the shards contain no utterances. Correct the patterns.")


def _sets_of(pattern: str, storage: Storage, anew: bool) -> list[ShardSet]:
    if not pattern.endswith(".tar"):
        return [_read_folder(folder.rstrip("/"), storage, anew) for folder in _expanded(pattern, storage)]
    names_by_folder: dict[str, set[str]] = {}
    for location in _expanded(pattern, storage):
        folder, _, name = location.rpartition("/")
        names_by_folder.setdefault(folder or ".", set()).add(name)
    return [_select(_read_folder(folder, storage, anew), names, folder) for folder, names in names_by_folder.items()]


def _expanded(pattern: str, storage: Storage) -> list[str]:
    try:
        return storage.expand(pattern)
    except OSError as error:
        raise _refusal(f"The shards {pattern} cannot be listed: {first_line(error)}.", error) from error


def _select(shard_set: ShardSet, names: set[str], folder: str) -> ShardSet:
    unknown = sorted(names - {shard.name for shard in shard_set.shards})
    if unknown:
        raise UserError(
            f"The shard {unknown[0]} is not in the index of {folder}. Index the folder again, or correct the pattern."
        )
    kept = [number for number, shard in enumerate(shard_set.shards) if shard.name in names]
    return replace(
        shard_set, shards=tuple(shard_set.shards[number] for number in kept), first_rows=shard_set.first_rows[kept]
    )


def _read_folder(folder: str, storage: Storage, anew: bool) -> ShardSet:
    sizes = _sizes(folder, storage)
    try:
        shard_set = _load_set(folder, storage)
    except UserError:
        raise
    except OSError as error:
        raise _unreadable(folder, error) from error
    except Exception as error:
        # The parsers of both files raise errors of many types for damaged bytes.
        raise UserError(
            f"The index of {folder} is damaged ({SHARD_TABLE_FILE} or {INDEX_FILE}). Pack or index the folder again."
        ) from error
    if len(shard_set.records) == 0:
        raise UserError(f"The index of {folder} lists no utterances. Pack some audio into the folder first.")
    if shard_set.records.dtype != RECORD or len(shard_set.records) != shard_set.num_utterances:
        raise UserError(
            f"The files {INDEX_FILE} and {SHARD_TABLE_FILE} in {folder} do not belong together. Pack or index the "
            "folder again."
        )
    _check_records(shard_set, folder, storage, anew)
    for shard in shard_set.shards:
        _check_size(shard, folder, sizes)
    return shard_set


class _ShardRow(BaseModel):
    """A shard in the shard table."""

    model_config = ConfigDict(strict=True)

    location: str
    num_utterances: NonNegativeInt
    num_bytes: NonNegativeInt
    sha256: str


class _Table(BaseModel):
    """What is read of the shard table; `write_index` writes more for people."""

    model_config = ConfigDict(strict=True)

    languages: list[str]
    layout: dict[str, Any]
    longest_seconds: Annotated[float, Field(ge=0, lt=2**32 / 1000)]
    most_text_tokens: Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
    most_instruction_tokens: Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
    records_sha256: str
    shards: list[_ShardRow]


def _load_set(folder: str, storage: Storage) -> ShardSet:
    contents = json.loads(storage.read_all(join(folder, SHARD_TABLE_FILE)))
    if contents.get("format") not in _READ_FORMATS:
        raise UserError(
            f"The index of {folder} has format {contents.get('format')!r}, but this version reads format "
            f"{FORMAT_VERSION}. Index the set again: `voxtral-dist shards index {folder}`."
        )
    if contents["format"] == FORMAT_VERSION and contents.pop(_CHECKSUM, None) != json_checksum(contents):
        raise UserError(
            f"The file {SHARD_TABLE_FILE} of {folder} is damaged: it has another checksum than when it was written. "
            "Copy it again, or pack or index the folder again."
        )
    table = _Table.model_validate(contents)
    shards = tuple(Shard(**(row.model_dump() | {"location": _absolute(row.location, folder)})) for row in table.shards)
    counts = [shard.num_utterances for shard in shards]
    records = np.load(storage.local_copy(join(folder, INDEX_FILE)), mmap_mode="r")
    if records.ndim != 1:
        raise ValueError("an index has one dimension")
    shard_set = ShardSet(
        shards=shards,
        records=records,
        first_rows=np.cumsum([0, *counts[:-1]], dtype=np.int64),
        languages=tuple(table.languages),
        layout=UtteranceLayout.from_json(table.layout),
        longest_seconds=table.longest_seconds,
        most_text_tokens=table.most_text_tokens,
        most_instruction_tokens=table.most_instruction_tokens,
        records_sha256=table.records_sha256,
    )
    shard_set.advise(is_sequential=False)
    return shard_set


def _check_records(shard_set: ShardSet, folder: str, storage: Storage, anew: bool) -> None:
    """Compare the records with their checksum: one flipped bit would change the order of the utterances."""
    records = shard_set.records
    assert isinstance(records, np.memmap)
    path = Path(str(records.filename))
    try:
        found = storage.digest(path, records.offset, anew=anew)
    except OSError as error:
        raise _unreadable(folder, error) from error
    if found != shard_set.records_sha256:
        copy = f", read from the copy {path}" if is_remote(folder) else ""
        raise UserError(
            f"The file {INDEX_FILE} of {folder}{copy} is damaged: its records have another checksum than when they "
            f"were written. Copy {INDEX_FILE} and {SHARD_TABLE_FILE} again, or pack or index the folder again."
        )


def _unreadable(folder: str, error: OSError) -> UserError:
    if isinstance(error, FileNotFoundError):
        return _no_index(folder)
    return _refusal(f"The index of {folder} cannot be read: {error.strerror or first_line(error)}.", error)


def _refusal(message: str, error: OSError) -> UserError:
    """An error of the input, or of a storage that may work again when the same command is rerun."""
    if is_unreachable(error):
        return ReadError(f"{message} Its storage fails: fix that, and rerun the same command.")
    return UserError(message)


def _no_index(folder: str, problem: str = f"has no complete index ({SHARD_TABLE_FILE} and {INDEX_FILE})") -> UserError:
    return UserError(
        f"The shard folder {folder} {problem}. Make it with `voxtral-dist shards pack SOURCE {folder}`, or index its "
        f"tars with `voxtral-dist shards index {folder}`."
    )


def _sizes(folder: str, storage: Storage) -> dict[str, int] | None:
    """The sizes of the files in a folder, by name; None if a server doesn't list them."""
    try:
        sizes = storage.sizes(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"The shard folder {folder} does not exist. Make it with `voxtral-dist shards pack SOURCE {folder}`, or "
            "correct the path in the configuration."
        ) from error
    except OSError as error:
        raise _refusal(f"The shard folder {folder} cannot be listed: {first_line(error)}.", error) from error
    if not sizes and is_remote(folder):
        return None
    if not {SHARD_TABLE_FILE, INDEX_FILE} <= sizes.keys():
        raise _no_index(folder) if sizes else _no_index(folder, "is empty")
    return sizes


def _check_size(shard: Shard, folder: str, sizes: dict[str, int] | None) -> None:
    if sizes is None or shard.location != join(folder, shard.name):
        return
    num_bytes = sizes.get(shard.name)
    if num_bytes is None:
        raise UserError(
            f"The shard {shard.location} is missing, but the index of its folder lists it. Restore it, or index the "
            "folder again."
        )
    if num_bytes != shard.num_bytes:
        raise UserError(
            f"The shard {shard.location} has {counted(num_bytes, 'byte')}, but had {shard.num_bytes} when it was "
            "indexed. Copy it again, or pack or index the folder again."
        )


def _relative(shard: Shard, folder: Path) -> str:
    return shard.name if shard.location == join(str(folder), shard.name) else masked(shard.location)


def _absolute(location: str, folder: str) -> str:
    return location if "/" in location else join(folder, location)
