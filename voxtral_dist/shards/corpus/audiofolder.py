"""Hugging Face's audio folders: audio files, with their texts in `metadata.csv` or `metadata.jsonl`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from voxtral_dist.data.stored.checks import Cause
from voxtral_dist.errors import UserError
from voxtral_dist.shards.corpus.audio_places import folded, places_of
from voxtral_dist.shards.corpus.folder import folder_files
from voxtral_dist.shards.corpus.importer import CorpusContents, Importer, digest_files
from voxtral_dist.shards.corpus.manifests import read_json
from voxtral_dist.shards.corpus.options import CorpusOptions
from voxtral_dist.shards.corpus.table_dialect import first_lines, sniffed_dialect
from voxtral_dist.shards.corpus.tables import read_table
from voxtral_dist.shards.corpus.utterances import Line, Refusal, key_of

_FILE_COLUMN = re.compile(r"\bfile_name\b")
# Several data sets of one repository are described here, and read by `datasets`.
_CARD = "README.md"


def read_audio_folder(folder: Path, tables: Sequence[Path], options: CorpusOptions) -> Iterator[Line]:
    """The rows of the tables, then refusals of audio files beside them that no row names.

    Raises:
        UserError: a table cannot be read, or has no column for the audio or text.
    """
    named: set[str] = set()
    for table in tables:
        prefix = table.parent.relative_to(folder).as_posix()
        for line in _rows(table, options):
            name = line.key if isinstance(line, Refusal) else line.audio.location
            named.add(folded(os.path.normpath(name)))
            # Files of two folders may have the same name.
            yield line if prefix == "." else replace(line, key=f"{key_of(f'{prefix}/x')[:-1]}{line.key}")
    for path in folder_files(folder).audio:
        table_folder = next((table.parent for table in tables if table.parent in path.parents), None)
        if table_folder is None:
            continue
        key = key_of(path.relative_to(table_folder).as_posix())
        if not {folded(os.path.normpath(path)), folded(key)} & named:
            reason = "no row of the metadata beside it names this file"
            yield Refusal(str(path), key_of(path.relative_to(folder).as_posix()), Cause.EMPTY_TEXT, reason)


def _rows(table: Path, options: CorpusOptions) -> Iterator[Line]:
    places = partial(places_of, bases=(table.parent,))
    if table.suffix == ".jsonl":
        return read_json(table, options.names, places)
    dialect = sniffed_dialect(table, ",", options.names, options.columns, ("audio", "text"))
    return read_table(table, dialect, options.names, places)


def _tables(folder: Path) -> list[Path]:
    """The tables of metadata in a folder, its folders and theirs."""
    found = (path for depth in ("", "*/", "*/*/") for path in folder.glob(f"{depth}metadata.*"))
    return sorted(path for path in found if path.suffix in (".csv", ".jsonl") and _has_file_names(path))


def _has_file_names(table: Path) -> bool:
    return _FILE_COLUMN.search("".join(first_lines(table, 1))) is not None


def _chosen(tables: list[Path], split: str | None, folder: Path) -> list[Path]:
    """The tables of a split: the folders above them name it.

    Raises:
        UserError: there are several splits and none is chosen, or it does not exist.
    """
    splits = {table: table.parent.name for table in tables if table.parent != folder}
    names = sorted(set(splits.values()))
    if split is None and len(names) > 1:
        raise UserError(f"The folder {folder} has several splits: pass one of them by --split: {', '.join(names)}.")
    if split is not None and split not in names:
        has = f"has {', '.join(names)}" if names else "has none"
        raise UserError(f"`--split` must be one of the splits of the folder {folder}, but is {split!r}: it {has}.")
    return tables if split is None else [table for table in tables if splits.get(table) == split]


def _is_audio_folder(source: str) -> bool:
    folder = Path(source).expanduser()
    return folder.is_dir() and bool(_tables(folder)) and not _has_configurations(folder / _CARD)


def _has_configurations(card: Path) -> bool:
    return card.is_file() and any(line.startswith("configs:") for line in first_lines(card, 200))


def _open(source: str, options: CorpusOptions) -> CorpusContents:
    folder = Path(source).expanduser()
    tables = _chosen(_tables(folder), options.split, folder)
    if not tables:
        raise UserError(f"The folder {folder} has no metadata.csv or metadata.jsonl with a column file_name.")
    identity = {"sha256": digest_files(tables, folder), "split": options.split}
    return CorpusContents(identity, None, lambda: read_audio_folder(folder, tables, options))


AUDIO_FOLDER = Importer("audiofolder", _is_audio_folder, _open)
