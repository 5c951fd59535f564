"""Shard sets removed, and nothing else that lies in their folder."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from voxtral_dist.data.stored.index_files import INDEX_FILE, SHARD_TABLE_FILE
from voxtral_dist.data.stored.storage import is_remote
from voxtral_dist.errors import UserError
from voxtral_dist.shards.corpus.parts import CorpusPart
from voxtral_dist.shards.journal import JOURNAL_FILE, PACKING_FILES, leftover_pattern, state_folder
from voxtral_dist.shards.packed_parts import parts_in
from voxtral_dist.text.json_text import parse_json

_PACKED_NAME = re.compile(r"[^/]+?(?P<part>-\d+-of-\d+)?-(?P<number>\d{6})\.tar")


def remove_set(folder: Path, sources: Iterable[str] = (), part: CorpusPart | None = None) -> None:
    """Remove the complete or unfinished shard set in a folder; do nothing if there is none.

    Args:
        folder: that of the set.
        sources: tars from which the next set is packed.
        part: remove this part of an unmerged set only; None: the set, or all its parts.

    Raises:
        UserError: it cannot be removed, was not made by `shards pack`, holds a source, or has damaged files.
    """
    for source in sources:
        if not is_remote(source) and Path(source).resolve().parent == folder.resolve():
            raise UserError(f"`--overwrite` would remove {source}, which is to be packed: choose another folder.")
    if part is None:
        for found in parts_in(folder):
            _remove(folder, found)
        _remove(folder, None)
    elif part in parts_in(folder):
        _remove(folder, part)


def _remove(folder: Path, part: CorpusPart | None) -> None:
    state = state_folder(folder, part)
    table, journal = folder / SHARD_TABLE_FILE, state / JOURNAL_FILE
    try:
        if part is None and table.is_file():
            shards = [shard["location"] for shard in parse_json(table.read_bytes())["shards"]]
        elif journal.is_file():
            rows = [parse_json(line) for line in journal.read_bytes().splitlines()[1:]]
            shards = [row["shard"]["location"] for row in rows if "shard" in row]
        elif part is None:
            return
        else:
            shards = []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"The folder {folder} holds a set whose files are damaged, so its shards are not known: remove it yourself."
        ) from error
    _refuse_other_tars(shards, folder)
    # Without its table a set is no set, so a removal that is interrupted leaves none that looks complete.
    index = [folder / SHARD_TABLE_FILE, folder / INDEX_FILE] if part is None else []
    try:
        for path in (*index, *(folder / name for name in shards), *(state / name for name in PACKING_FILES)):
            path.unlink(missing_ok=True)
        for leftover in folder.glob(leftover_pattern(part)):
            leftover.unlink()
        if part is not None:
            state.rmdir()
    except OSError as error:
        raise UserError(f"The set in {folder} cannot be removed: {error.strerror}.") from error


def _refuse_other_tars(shards: Sequence[str], folder: Path) -> None:
    """Refuse to remove tars that another tool made, and `shards index` only described."""
    num_before: Counter[str | None] = Counter()
    for name in shards:
        packed = _PACKED_NAME.fullmatch(name)
        if packed is None or int(packed["number"]) != num_before[packed["part"]]:
            raise UserError(f"The set in {folder} was not made by `shards pack`, as {name} shows: remove it yourself.")
        num_before[packed["part"]] += 1
