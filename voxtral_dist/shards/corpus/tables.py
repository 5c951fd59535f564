"""Tables as utterances: those of Common Voice, of spreadsheets, and of scripts."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from voxtral_dist.data.stored.checks import Cause
from voxtral_dist.output.counting import counted
from voxtral_dist.shards.corpus.fields import FieldNames, first_of
from voxtral_dist.shards.corpus.formats import CorpusFormat
from voxtral_dist.shards.corpus.importer import CorpusContents, Importer, digest_file, local_manifest, suffix_of
from voxtral_dist.shards.corpus.manifest_lines import LARGEST_LINE_BYTES, LineTooLongError, ManifestLines
from voxtral_dist.shards.corpus.manifest_places import manifest_places
from voxtral_dist.shards.corpus.manifests import lost_lines
from voxtral_dist.shards.corpus.options import CorpusOptions
from voxtral_dist.shards.corpus.rows import Places, row_line
from voxtral_dist.shards.corpus.suffixes import AUDIO_FILE_SUFFIXES
from voxtral_dist.shards.corpus.table_dialect import TableDialect, sniffed_dialect, unquoted
from voxtral_dist.shards.corpus.utterances import Line, Refusal, key_of

_DECIMAL_COMMA = re.compile(r"\d+,\d+")
_NUMBERS = ("duration", "duration_ms", "offset", "start", "end", "start_time", "end_time")


def read_table(path: Path, dialect: TableDialect, names: FieldNames, places: Places) -> Iterator[Line]:
    """The rows of a table as utterances.

    Raises:
        UserError: the file cannot be read.
    """
    csv.field_size_limit(LARGEST_LINE_BYTES)
    with closing(ManifestLines(path)) as lines:
        for _ in range(dialect.num_lines_before):
            next(lines, None)
        rows = dialect.cells(lines)
        while True:
            first = lines.number + 1
            try:
                cells = next(rows)
            except StopIteration:
                break
            except csv.Error as error:
                yield Refusal(f"{path}:{first}", "", Cause.MALFORMED, _broken(error, first, lines.number))
                continue
            if cells:
                yield _row(cells, dialect, names, places, f"{path}:{lines.number}")
        yield from lost_lines(lines, path)


def _broken(error: csv.Error, first: int, last: int) -> str:
    if isinstance(error, LineTooLongError) or last <= first:
        return f"the row cannot be read ({error})"
    return f"lines {first} to {last} cannot be read as a row ({error}): a quote in the first may have no end"


def _row(cells: list[str], dialect: TableDialect, names: FieldNames, places: Places, place: str) -> Line:
    while len(cells) > len(dialect.columns) and not cells[-1]:
        cells.pop()
    row: dict[str, Any] = dict(zip(dialect.columns, cells, strict=False))
    key = key_of(str(first_of(row, names.audio) or "clip"))
    if len(cells) != len(dialect.columns):
        counts = f"{counted(len(cells), 'cell')}, but the table has {counted(len(dialect.columns), 'column')}"
        return Refusal(place, key, Cause.MALFORMED, f"the row has {counts}")
    if any(_holds_rows(cell, dialect, names) for cell in cells):
        message = "the row has a cell that holds further rows: a quote in it has no end"
        return Refusal(place, key, Cause.MALFORMED, message)
    if not dialect.is_quoted:
        row = {name: unquoted(cell) for name, cell in row.items()}
    if dialect.separator == ";":
        row |= {name: row[name].replace(",", ".") for name in _NUMBERS if _DECIMAL_COMMA.fullmatch(row.get(name, ""))}
    return row_line({name: cell for name, cell in row.items() if cell != ""}, names, places, place)


def _holds_rows(cell: str, dialect: TableDialect, names: FieldNames) -> bool:
    """Whether a cell of several lines swallowed rows, because a quote that belongs to a text opened it."""
    return any(_is_row(line, dialect, names) for line in cell.splitlines()[1:])


def _is_row(line: str, dialect: TableDialect, names: FieldNames) -> bool:
    cells = line.split(dialect.separator)
    audio = first_of(dict(zip(dialect.columns, cells, strict=False)), names.audio)
    named = isinstance(audio, str) and Path(audio).suffix.lower() in AUDIO_FILE_SUFFIXES
    return len(cells) >= len(dialect.columns) and named


def _open(source: str, options: CorpusOptions, separator: str) -> CorpusContents:
    path = local_manifest(source)
    digest, num_lines = digest_file(path)
    dialect = sniffed_dialect(path, separator, options.names, options.columns, ("audio", "text"))
    places = manifest_places(path.parent, options, folders_first=True)
    read = partial(read_table, path, dialect, options.names, places)
    return CorpusContents({"sha256": digest}, None if path.suffix == ".gz" else num_lines, read)


def _importer(name: CorpusFormat, separator: str) -> Importer:
    def recognizes(source: str) -> bool:
        return suffix_of(source) == f".{name}"

    return Importer(name, recognizes, partial(_open, separator=separator), is_labels=True)


CSV = _importer("csv", ",")
TSV = _importer("tsv", "\t")
