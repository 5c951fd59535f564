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
from typing import Any

import numpy as np

from voxtral_dist.data.stored.layout import UtteranceLayout
from voxtral_dist.data.stored.shard_set import RECORD, Records, Shard, ShardSet
from voxtral_dist.data.stored.storage import Storage, is_remote, join
from voxtral_dist.errors import UserError
from voxtral_dist.files import write_atomically

INDEX_FILE = "index.npy"
SHARD_TABLE_FILE = "shards.json"
FORMAT_VERSION = 3


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
    table = {
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
    write_atomically(folder / SHARD_TABLE_FILE, json.dumps(table, indent=1, ensure_ascii=False))


def read_sets(patterns: Sequence[str], storage: Storage) -> list[ShardSet]:
    """The shard sets that patterns match; arguments and errors as of `read_index`."""
    return [shard_set for pattern in patterns for shard_set in _sets_of(str(pattern), storage)]


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


def _sets_of(pattern: str, storage: Storage) -> list[ShardSet]:
    if not pattern.endswith(".tar"):
        return [_read_folder(folder.rstrip("/"), storage) for folder in storage.expand(pattern)]
    names_by_folder: dict[str, set[str]] = {}
    for location in storage.expand(pattern):
        folder, _, name = location.rpartition("/")
        names_by_folder.setdefault(folder or ".", set()).add(name)
    return [_select(_read_folder(folder, storage), names, folder) for folder, names in names_by_folder.items()]


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


def _read_folder(folder: str, storage: Storage) -> ShardSet:
    sizes = _sizes(folder, storage)
    try:
        shard_set = _load_set(folder, storage)
    except (ValueError, TypeError, KeyError, AttributeError, EOFError) as error:
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
    for shard in shard_set.shards:
        _check_size(shard, folder, sizes)
    return shard_set


def _load_set(folder: str, storage: Storage) -> ShardSet:
    table: dict[str, Any] = json.loads(storage.read_all(join(folder, SHARD_TABLE_FILE)))
    if table.get("format") != FORMAT_VERSION:
        raise UserError(
            f"The index of {folder} has format {table.get('format')!r}, but this version reads format "
            f"{FORMAT_VERSION}. Index the set again: `voxtral-dist shards index {folder}`."
        )
    shards = tuple(Shard(**(row | {"location": _absolute(row["location"], folder)})) for row in table["shards"])
    counts = [shard.num_utterances for shard in shards]
    shard_set = ShardSet(
        shards=shards,
        records=np.load(storage.local_copy(join(folder, INDEX_FILE)), mmap_mode="r"),
        first_rows=np.cumsum([0, *counts[:-1]], dtype=np.int64),
        languages=tuple(table["languages"]),
        layout=UtteranceLayout.from_json(table["layout"]),
        longest_seconds=float(table["longest_seconds"]),
        most_text_tokens=int(table["most_text_tokens"]),
        most_instruction_tokens=int(table["most_instruction_tokens"]),
        records_sha256=str(table["records_sha256"]),
    )
    shard_set.advise(is_sequential=False)
    return shard_set


def _sizes(folder: str, storage: Storage) -> dict[str, int] | None:
    """The sizes of the files in a folder, by name; None if a server doesn't list them."""
    try:
        sizes = storage.sizes(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"The shard folder {folder} does not exist. Make it with `voxtral-dist shards pack SOURCE {folder}`, or "
            "correct the path in the configuration."
        ) from error
    if not sizes and is_remote(folder):
        return None
    if not {SHARD_TABLE_FILE, INDEX_FILE} <= sizes.keys():
        problem = f"has no complete index ({SHARD_TABLE_FILE} and {INDEX_FILE})" if sizes else "is empty"
        raise UserError(
            f"The shard folder {folder} {problem}. Make it with `voxtral-dist shards pack SOURCE {folder}`, or index "
            f"its tars with `voxtral-dist shards index {folder}`."
        )
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
            f"The shard {shard.location} has {num_bytes} bytes, but had {shard.num_bytes} when it was indexed. Copy it "
            "again, or pack or index the folder again."
        )


def _relative(shard: Shard, folder: Path) -> str:
    return shard.name if shard.location == join(str(folder), shard.name) else shard.location


def _absolute(location: str, folder: str) -> str:
    return location if "/" in location else join(folder, location)
