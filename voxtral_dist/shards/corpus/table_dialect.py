"""How a table is written: its separator, its quotes and its columns."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from voxtral_dist.errors import UserError
from voxtral_dist.output.counting import counted
from voxtral_dist.shards.corpus.fields import FieldNames
from voxtral_dist.shards.corpus.manifest_lines import LineTooLongError, ManifestLines

# What spreadsheets write depends on the country: a comma, or a semicolon where the comma is the decimal mark.
SEPARATORS = (",", ";", "\t", "|")
_SEPARATOR_LINE = re.compile(r"sep=(.)\r?\n?")


@dataclass(frozen=True)
class TableDialect:
    """How the rows of a table are read.

    columns: names of the cells. is_quoted: whether quotes around a cell belong to the table, as in CSV, or to the text.
    skips_spaces: whether a space follows each separator. num_lines_before: lines above the first row.
    """

    separator: str
    columns: tuple[str, ...]
    is_quoted: bool
    skips_spaces: bool
    num_lines_before: int

    def cells(self, lines: Iterable[str]) -> Iterator[list[str]]:
        """The rows of these lines as cells; raises `csv.Error` at a broken one, and can be continued."""
        return csv.reader(
            lines,
            delimiter=self.separator,
            quoting=csv.QUOTE_MINIMAL if self.is_quoted else csv.QUOTE_NONE,
            skipinitialspace=self.skips_spaces,
            strict=True,
        )


def sniffed_dialect(
    path: Path, usual_separator: str, names: FieldNames, columns: Sequence[str] | None, needed: Sequence[str]
) -> TableDialect:
    """The dialect of a table, by its first lines.

    Args:
        path: of the table.
        usual_separator: what its suffix promises; others are tried where it does not fit.
        names: columns that may hold audio, text and language.
        columns: of a table without a header; None: its first line names them.
        needed: which of `audio` and `text` it must have.

    Raises:
        UserError: no separator yields the columns.
    """
    head = first_lines(path, 2)
    fixed = _SEPARATOR_LINE.fullmatch(head[0]) if head else None
    line = "".join(head[int(fixed is not None) :][:1])
    separators = [fixed[1]] if fixed else [usual_separator, *(mark for mark in SEPARATORS if mark != usual_separator)]
    if columns is not None:
        return _without_header(path, separators, tuple(columns), line, int(fixed is not None))
    wanted = {what: getattr(names, what) for what in needed}
    found = [(separator, _header(line, separator, names)) for separator in separators]
    for separator, header in found:
        if all(set(options) & set(header) for options in wanted.values()):
            _refuse_repeated(header, names, path)
            return TableDialect(
                separator,
                header,
                is_quoted=separator in ",;" or _has_quoted_header(line, separator),
                skips_spaces=line.count(separator) == line.count(f"{separator} "),
                num_lines_before=1 + int(fixed is not None),
            )
    raise _missing_column(path, found[0][1], wanted)


def first_lines(path: Path, count: int) -> list[str]:
    """The first lines of a file; raises a `UserError` if it cannot be read."""
    with closing(ManifestLines(path)) as lines, suppress(LineTooLongError):
        return list(islice(lines, count))
    return []


def unquoted(cell: str) -> str:
    """The text of a cell that a script quoted because of the quotes in it; other cells as they are.

    Common Voice does not quote the cells of its TSV files, so a pair of quotes around a text belongs to it.
    """
    inner = cell[1:-1]
    is_quoted = len(cell) > 2 and cell[0] == cell[-1] == '"' and '""' in inner and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if is_quoted else cell


def _without_header(
    path: Path, separators: Sequence[str], columns: tuple[str, ...], line: str, num_lines_before: int
) -> TableDialect:
    for separator in separators:
        with suppress(csv.Error):
            cells = next(csv.reader([line], delimiter=separator), [])
            if len(cells) == len(columns):
                return TableDialect(separator, columns, separator in ",;", False, num_lines_before)
    raise UserError(
        f"`--columns` names {counted(len(columns), 'column')}, but the first row of the table {path} has another "
        f"number of cells: {line.strip()[:200]}"
    )


def _header(line: str, separator: str, names: FieldNames) -> tuple[str, ...]:
    """The names of the columns; those that differ from known ones in case alone are these."""
    try:
        cells = [cell.strip() for cell in next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])]
    except csv.Error:
        return ()
    while cells and not cells[-1]:
        cells.pop()
    known = {name.casefold(): name for name in (*names.audio, *names.text, *names.language, "duration")}
    return tuple(cell if cell in known.values() else known.get(cell.casefold(), cell) for cell in cells)


def _has_quoted_header(line: str, separator: str) -> bool:
    cells = line.rstrip("\r\n").split(separator)
    return all(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in cells)


def _refuse_repeated(header: tuple[str, ...], names: FieldNames, path: Path) -> None:
    for name in (*names.audio, *names.text, *names.language):
        if header.count(name) > 1:
            raise UserError(
                f"The table {path} has {counted(header.count(name), 'column')} named {name}: rename all but one."
            )


def _missing_column(path: Path, header: Sequence[str], wanted: dict[str, tuple[str, ...]]) -> UserError:
    what, options = next((what, options) for what, options in wanted.items() if not set(options) & set(header))
    return UserError(
        f"The table {path} has no column for the {what}, only {', '.join(header) or 'nothing'}: it needs one of "
        f"{', '.join(options)}, or name the column by --{what}-field. If the table has no header, name all its columns "
        "by --columns, such as --columns audio,text."
    )
