"""Manifests as utterances: JSON lines of NeMo and Lhotse, tables of Common Voice."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from voxtral_dist.data.stored.checks import Cause, UnusableError, unusable_on_failure
from voxtral_dist.data.stored.storage import is_remote
from voxtral_dist.errors import UserError
from voxtral_dist.shards.corpus.audio_location import AudioLocation
from voxtral_dist.shards.corpus.fields import FieldNames, checked_language, checked_seconds, checked_text, first_of
from voxtral_dist.shards.corpus.lhotse import is_cut, read_cut
from voxtral_dist.shards.corpus.manifest_lines import LARGEST_LINE_BYTES, LineTooLongError, ManifestLines
from voxtral_dist.shards.corpus.utterances import Refusal, Utterance, key_of
from voxtral_dist.text.json_text import parse_json


def read_json_lines(path: Path, names: FieldNames) -> Iterator[Utterance | Refusal]:
    """The lines of a manifest of JSON lines or cuts; audio paths are relative to the manifest.

    Raises:
        UserError: the file cannot be read.
    """
    with closing(ManifestLines(path)) as lines:
        while True:
            try:
                line = next(lines)
            except StopIteration:
                break
            except LineTooLongError as error:
                yield Refusal(f"{path}:{lines.number}", "", Cause.TOO_LARGE, f"the line is too long: {error}")
                continue
            if line.strip():
                yield _parse_line(line, names, path.parent, f"{path}:{lines.number}")
        yield from _lost_lines(lines, path)


def read_table(path: Path, names: FieldNames, delimiter: str) -> Iterator[Utterance | Refusal]:
    """The rows of a table with a header; audio paths are relative to `clips/` beside it if that exists, else to it.

    Raises:
        UserError: the file cannot be read, or has no column for audio or text.
    """
    csv.field_size_limit(LARGEST_LINE_BYTES)
    # Common Voice does not quote cells of its TSV files; CSV files do.
    with closing(ManifestLines(path)) as lines:
        rows = csv.DictReader(
            lines, delimiter=delimiter, quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
        )
        _check_header(rows, names, path)
        clips = path.parent / "clips"
        base = clips if clips.is_dir() else path.parent
        yield from _table_rows(rows, lines, names, base, path)
        yield from _lost_lines(lines, path)


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
        row = parse_json(line)
    except ValueError as error:
        why = str(error) if _is_unicode(line) else "it is not UTF-8 text: convert the manifest first"
        return Refusal(place, key, Cause.NOT_JSON, f"the line is not valid JSON ({why})")
    if not isinstance(row, dict):
        return Refusal(place, key, Cause.NOT_JSON, "the line is not a JSON object")
    try:
        with unusable_on_failure():
            cut = is_cut(row)
            key = str(row.get("id", "")) if cut else str(first_of(row, names.audio) or "")
            return read_cut(row, base, place) if cut else row_utterance(row, names, base, place)
    except UnusableError as error:
        return _refused(place, key, error)


def _is_unicode(line: str) -> bool:
    return line.isascii() or line.encode("utf-8", "replace").decode("utf-8") == line


def _lost_lines(lines: ManifestLines, path: Path) -> Iterator[Refusal]:
    """What stands for the lines behind damage."""
    if lines.damage is not None:
        reason = f"the manifest ends here: {lines.damage}; lines behind it are lost"
        yield Refusal(f"{path}:{lines.number + 1}", "", Cause.UNREADABLE, reason)


def _refused(place: str, key: str, error: UnusableError) -> Refusal:
    return Refusal(
        place, key_of(key) if key else "", error.cause, f"the utterance {key} {error}" if key else str(error)
    )


def _table_rows(
    rows: csv.DictReader[str], lines: ManifestLines, names: FieldNames, base: Path, path: Path
) -> Iterator[Utterance | Refusal]:
    iterator = iter(rows)
    while True:
        try:
            row: dict[Any, Any] = next(iterator)
        except StopIteration:
            return
        except csv.Error as error:
            yield Refusal(f"{path}:{lines.number}", "", Cause.MALFORMED, f"the row cannot be read ({error})")
            continue
        yield _table_row(row, names, base, f"{path}:{lines.number}")


def _table_row(row: dict[Any, Any], names: FieldNames, base: Path, place: str) -> Utterance | Refusal:
    key = str(first_of(row, names.audio) or "")
    if None in row or None in row.values():
        return Refusal(place, key, Cause.MALFORMED, "the row has more or fewer cells than the header")
    filled = {name: cell for name, cell in row.items() if cell != ""}
    try:
        with unusable_on_failure():
            return row_utterance(filled, names, base, place)
    except UnusableError as error:
        return _refused(place, key, error)


def _check_header(rows: csv.DictReader[str], names: FieldNames, path: Path) -> None:
    try:
        header = list(rows.fieldnames or [])
    except csv.Error as error:
        raise UserError(f"The header of the table {path} cannot be read: {error}.") from error
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
