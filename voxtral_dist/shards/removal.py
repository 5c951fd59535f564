"""Shard sets removed, and nothing else that lies in their folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from voxtral_dist.data.stored.index_files import INDEX_FILE, SHARD_TABLE_FILE
from voxtral_dist.data.stored.storage import is_remote
from voxtral_dist.errors import UserError
from voxtral_dist.shards.journal import JOURNAL_FILE, PACKING_FILES
from voxtral_dist.text.json_text import parse_json

_PACKED_NAME = re.compile(r"[^/]+-(?P<number>\d{6})\.tar")


def remove_set(folder: Path, sources: Iterable[str] = ()) -> None:
    """Remove the complete or unfinished shard set in a folder; do nothing if there is none.

    Args:
        folder: that of the set.
        sources: tars from which the next set is packed.

    Raises:
        UserError: it cannot be removed, was not made by `shards pack`, holds a source, or has damaged files.
    """
    for source in sources:
        if not is_remote(source) and Path(source).resolve().parent == folder.resolve():
            raise UserError(f"`--overwrite` would remove {source}, which is to be packed: choose another folder.")
    table, journal = folder / SHARD_TABLE_FILE, folder / JOURNAL_FILE
    try:
        if table.is_file():
            shards = [shard["location"] for shard in parse_json(table.read_bytes())["shards"]]
        elif journal.is_file():
            rows = [parse_json(line) for line in journal.read_bytes().splitlines()[1:]]
            shards = [row["shard"]["location"] for row in rows]
        else:
            return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"The folder {folder} holds a set whose files are damaged, so its shards are not known: remove it yourself."
        ) from error
    _refuse_other_tars(shards, folder)
    # Without its table a set is no set, so a removal that is interrupted leaves none that looks complete.
    names = [SHARD_TABLE_FILE, INDEX_FILE, *shards, *PACKING_FILES]
    try:
        for name in names:
            (folder / name).unlink(missing_ok=True)
        for leftover in folder.glob(".*.tar.tmp"):
            leftover.unlink()
    except OSError as error:
        raise UserError(f"The set in {folder} cannot be removed: {error.strerror}.") from error


def _refuse_other_tars(shards: Sequence[str], folder: Path) -> None:
    """Refuse to remove tars that another tool made, and `shards index` only described."""
    for number, name in enumerate(shards):
        packed = _PACKED_NAME.fullmatch(name)
        if packed is None or int(packed["number"]) != number:
            raise UserError(f"The set in {folder} was not made by `shards pack`, as {name} shows: remove it yourself.")
