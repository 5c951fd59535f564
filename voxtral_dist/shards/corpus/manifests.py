"""Manifests as utterances: JSON lines of NeMo and Lhotse, tables of Common Voice."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from voxtral_dist.data.stored.checks import Cause, UnusableError
from voxtral_dist.data.stored.storage import is_remote
from voxtral_dist.errors import UserError
from voxtral_dist.shards.corpus.audio_location import AudioLocation
from voxtral_dist.shards.corpus.fields import FieldNames, checked_language, checked_seconds, checked_text, first_of
from voxtral_dist.shards.corpus.lhotse import is_cut, read_cut
from voxtral_dist.shards.corpus.utterances import Refusal, Utterance, key_of

_LARGEST_CELL_BYTES = 2**27


def read_json_lines(path: Path, names: FieldNames) -> Iterator[Utterance | Refusal]:
    """The lines of a manifest of JSON lines or cuts; audio paths are relative to the manifest.

    Raises:
        UserError: the file is not UTF-8 text.
    """
    with _open_text(path) as lines:
        for number, line in enumerate(_decoded(lines, path), start=1):
            if line.strip():
                yield _parse_line(line, names, path.parent, f"{path}:{number}")


def read_table(path: Path, names: FieldNames, delimiter: str) -> Iterator[Utterance | Refusal]:
    """The rows of a table with a header; audio paths are relative to `clips/` beside it if that exists, else to it.

    Raises:
        UserError: the file is not UTF-8 text, or has no column for audio or text.
    """
    csv.field_size_limit(_LARGEST_CELL_BYTES)
    # Common Voice does not quote cells of its TSV files; CSV files do.
    with _open_text(path) as lines:
        rows = csv.DictReader(
            _decoded(lines, path),
            delimiter=delimiter,
            quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL,
        )
        _check_header(rows.fieldnames or [], names, path)
        clips = path.parent / "clips"
        base = clips if clips.is_dir() else path.parent
        yield from _table_rows(rows, names, base, path)


def row_utterance(row: Mapping[str, Any], names: FieldNames, base: Path, place: str) -> Utterance:
    """The utterance of a row with a path to its audio, relative to `base`.

    Raises:
        UnusableError: the row has no audio, no text, or an unknown language.
    """
    audio = _audio_name(row, names)
    return Utterance(
        key=_segment_key(audio, row),
        audio=_audio(audio, row, base),
        text=checked_text(first_of(row, names.text), names.text),
        language=checked_language(first_of(row, names.language)),
        place=place,
        claimed_seconds=checked_seconds(row, "duration"),
        extra=names.extra(row),
    )


def _parse_line(line: str, names: FieldNames, base: Path, place: str) -> Utterance | Refusal:
    key = ""
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise UnusableError(Cause.NOT_JSON, "the line is not a JSON object")
        cut = is_cut(row)
        key = str(row.get("id", "")) if cut else str(first_of(row, names.audio) or "")
        return read_cut(row, base, place) if cut else row_utterance(row, names, base, place)
    except (json.JSONDecodeError, RecursionError) as error:
        message = getattr(error, "msg", "too deeply nested")
        return Refusal(place, key, Cause.NOT_JSON, f"the line is not valid JSON ({message})")
    except UnusableError as error:
        return _refused(place, key, error)


def _refused(place: str, key: str, error: UnusableError) -> Refusal:
    return Refusal(
        place, key_of(key) if key else "", error.cause, f"the utterance {key} {error}" if key else str(error)
    )


def _table_rows(rows: csv.DictReader[str], names: FieldNames, base: Path, path: Path) -> Iterator[Utterance | Refusal]:
    iterator = iter(rows)
    while True:
        try:
            row: dict[Any, Any] = next(iterator)
        except StopIteration:
            return
        except csv.Error as error:
            yield Refusal(f"{path}:{rows.line_num}", "", Cause.MALFORMED, f"the row cannot be read ({error})")
            continue
        yield _table_row(row, names, base, f"{path}:{rows.line_num}")


def _table_row(row: dict[Any, Any], names: FieldNames, base: Path, place: str) -> Utterance | Refusal:
    key = str(first_of(row, names.audio) or "")
    if None in row or None in row.values():
        return Refusal(place, key, Cause.MALFORMED, "the row has more or fewer cells than the header")
    filled = {name: cell for name, cell in row.items() if cell != ""}
    try:
        return row_utterance(filled, names, base, place)
    except UnusableError as error:
        return _refused(place, key, error)


def _check_header(header: Any, names: FieldNames, path: Path) -> None:
    for what, wanted in (("audio", names.audio), ("text", names.text)):
        if not set(wanted) & set(header):
            raise UserError(
                f"The table {path} has no column for the {what}, only {', '.join(header) or 'nothing'}: it needs one "
                f"of {', '.join(wanted)}, or name the column by --{what}-field."
            )


def _audio_name(row: Mapping[str, Any], names: FieldNames) -> str:
    audio = first_of(row, names.audio)
    if not isinstance(audio, str):
        needed = f"it needs one of the fields {', '.join(names.audio)}"
        raise UnusableError(Cause.NO_AUDIO, f"the row names no audio: {needed}")
    return audio


def _audio(audio: str, row: Mapping[str, Any], base: Path) -> AudioLocation:
    location = audio if is_remote(audio) else str(base / audio)
    start_seconds = checked_seconds(row, "offset")
    if start_seconds is None:
        return AudioLocation(location)
    return AudioLocation(location, None, start_seconds, checked_seconds(row, "duration"))


def _segment_key(audio: str, row: Mapping[str, Any]) -> str:
    offset_seconds = checked_seconds(row, "offset")
    return key_of(audio) if offset_seconds is None else f"{key_of(audio)}-{round(offset_seconds * 1000):09d}"


def _open_text(path: Path) -> TextIO:
    # The encoding drops a byte-order mark.
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _decoded(lines: TextIO, path: Path) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise UserError(f"The manifest {path} is not UTF-8 text ({error.reason}): convert it first.") from error
    except (EOFError, gzip.BadGzipFile) as error:
        raise UserError(f"The manifest {path} is a damaged gzip file ({error}): copy it again.") from error
