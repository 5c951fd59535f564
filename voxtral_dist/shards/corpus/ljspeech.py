"""LJSpeech and its kin: a table without a header, of `id|text` or `id|text|normalized text`, beside the audio."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from voxtral_dist.errors import UserError
from voxtral_dist.shards.corpus.importer import CorpusContents, Importer, digest_file, local_manifest
from voxtral_dist.shards.corpus.manifest_places import manifest_places
from voxtral_dist.shards.corpus.options import CorpusOptions
from voxtral_dist.shards.corpus.table_dialect import TableDialect, first_lines, sniffed_dialect
from voxtral_dist.shards.corpus.tables import read_table

_SEPARATOR = "|"
_COLUMNS = ("audio", "text", "normalized_text")
# LJSpeech, M-AILABS and Thorsten; CSS10; KSS.
_NAMES = ("metadata.csv", "metadata.txt", "transcript.txt", "transcript.v.1.4.txt")
_SUFFIXES = (".csv", ".txt", ".psv", ".tsv")
_NUM_SNIFFED = 200


def _table_of(source: str) -> Path | None:
    """The table of a source, which may be its folder; None if there is none."""
    path = Path(source).expanduser()
    if path.is_dir():
        return next((path / name for name in _NAMES if _is_table(path / name)), None)
    return path if _is_table(path) else None


def _is_table(path: Path) -> bool:
    """Whether the first line of a file is a row: cells between bars, without the name of a column."""
    if path.suffix.lower() not in _SUFFIXES or not path.is_file():
        return False
    cells = "".join(first_lines(path, 1)).strip().split(_SEPARATOR)
    known = {"text", "sentence", "transcript", "transcription", "path", "audio", "audio_file", "file_name", "filename"}
    return len(cells) > 1 and all(cell.strip() for cell in cells[:2]) and not known & {cell.lower() for cell in cells}


def _columns(path: Path) -> tuple[str, ...]:
    """The names of the columns of a table without a header.

    Raises:
        UserError: they cannot be known.
    """
    rows = [line.rstrip("\r\n").split(_SEPARATOR) for line in first_lines(path, _NUM_SNIFFED)]
    seconds = [row[1].strip() for row in rows if len(row) > 2]
    if seconds and (all(cell.isdecimal() for cell in seconds) or len(set(seconds)) * 4 < len(seconds)):
        # Lists for VITS and others: path|speaker|text.
        raise UserError(
            f"The second column of {path} looks like speakers, not texts ({seconds[0]}): name all columns by "
            "--columns, such as --columns audio,speaker,text."
        )
    width = len(rows[0])
    return (*_COLUMNS[:width], *(f"column_{number}" for number in range(len(_COLUMNS) + 1, width + 1)))


def _dialect(path: Path, options: CorpusOptions) -> TableDialect:
    """The dialect of a table; its first line is a header if it has columns that the user named."""
    cells = {cell.strip() for cell in "".join(first_lines(path, 1)).split(_SEPARATOR)}
    if options.columns is None and cells & {*options.names.audio, *options.names.text}:
        return sniffed_dialect(path, _SEPARATOR, options.names, None, ("audio", "text"))
    columns = options.columns or _columns(path)
    return TableDialect(_SEPARATOR, columns, is_quoted=False, skips_spaces=False, num_lines_before=0)


def _open(source: str, options: CorpusOptions) -> CorpusContents:
    path = _table_of(source) or local_manifest(source)
    digest, num_lines = digest_file(path)
    dialect = _dialect(path, options)
    places = manifest_places(path.parent, options, folders_first=True)
    read = partial(read_table, path, dialect, options.names, places)
    return CorpusContents({"sha256": digest}, None if path.suffix == ".gz" else num_lines, read)


LJSPEECH = Importer("ljspeech", lambda source: _table_of(source) is not None, _open, is_labels=True)
