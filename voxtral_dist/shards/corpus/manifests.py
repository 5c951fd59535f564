"""Manifests of JSON as utterances: a row of NeMo or others, or a cut of Lhotse, in each line or in one array."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from voxtral_dist.data.stored.checks import Cause, UnusableError, unusable_on_failure
from voxtral_dist.errors import UserError
from voxtral_dist.shards.corpus.fields import FieldNames
from voxtral_dist.shards.corpus.importer import CorpusContents, Importer, digest_file, local_manifest
from voxtral_dist.shards.corpus.json_array import array_elements, begins_array
from voxtral_dist.shards.corpus.lhotse import is_cut, read_cut
from voxtral_dist.shards.corpus.manifest_lines import LineTooLongError, ManifestLines
from voxtral_dist.shards.corpus.manifest_places import manifest_places
from voxtral_dist.shards.corpus.options import CorpusOptions
from voxtral_dist.shards.corpus.rows import Places, refused, row_line
from voxtral_dist.shards.corpus.utterances import Line, Refusal
from voxtral_dist.text.json_text import parse_json


def read_json(path: Path, names: FieldNames, places: Places) -> Iterator[Line]:
    """The utterances of a manifest of JSON lines or of one array.

    Raises:
        UserError: the file cannot be read.
    """
    for place, row in json_rows(path):
        yield row if isinstance(row, Refusal) else _line(row, names, places, place)


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | Refusal]]:
    """The objects of a manifest with their places, and refusals of what is none.

    Raises:
        UserError: the file cannot be read.
    """
    return _array_rows(path) if begins_array(path) else _line_rows(path)


def _parsed(text: str, place: str) -> dict[str, Any] | Refusal:
    """The JSON object in a text, or why there is none."""
    try:
        row = parse_json(text)
    except ValueError as error:
        why = str(error) if _is_unicode(text) else "it is not UTF-8 text: convert the manifest first"
        return Refusal(place, "", Cause.NOT_JSON, f"the line is not valid JSON ({why})")
    if not isinstance(row, dict):
        return Refusal(place, "", Cause.NOT_JSON, "the line is not a JSON object")
    return row


def lost_lines(lines: ManifestLines, path: Path) -> Iterator[Refusal]:
    """What stands for the lines behind damage."""
    if lines.damage is not None:
        reason = f"the manifest ends here: {lines.damage}; lines behind it are lost"
        yield Refusal(f"{path}:{lines.number + 1}", "", Cause.UNREADABLE, reason)


def _line_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | Refusal]]:
    with closing(ManifestLines(path)) as lines:
        while True:
            try:
                line = next(lines)
            except StopIteration:
                break
            except LineTooLongError as error:
                place = f"{path}:{lines.number}"
                yield place, Refusal(place, "", Cause.TOO_LARGE, f"the line is too long: {error}")
                continue
            if line.strip():
                yield (place := f"{path}:{lines.number}"), _parsed(line, place)
        yield from ((lost.place, lost) for lost in lost_lines(lines, path))


def _array_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | Refusal]]:
    try:
        for element in array_elements(path):
            place = f"{path}:{element.line}"
            if element.error is None:
                yield place, _parsed(element.text, place)
            else:
                yield place, Refusal(place, "", Cause.UNREADABLE, element.error)
    except OSError as error:
        raise UserError(f"The manifest {path} cannot be read: {error.strerror or error}.") from error


def _line(row: dict[str, Any], names: FieldNames, places: Places, place: str) -> Line:
    if not is_cut(row):
        return row_line(row, names, places, place)
    try:
        with unusable_on_failure():
            return read_cut(row, places, place)
    except UnusableError as error:
        return refused(place, str(row.get("id", "")), error)


def _is_unicode(line: str) -> bool:
    return line.isascii() or line.encode("utf-8", "replace").decode("utf-8") == line


def _open(source: str, options: CorpusOptions) -> CorpusContents:
    path = local_manifest(source)
    digest, num_lines = digest_file(path)
    places = manifest_places(path.parent, options, folders_first=False)
    is_counted = path.suffix != ".gz" and not begins_array(path)
    return CorpusContents(
        {"sha256": digest}, num_lines if is_counted else None, partial(read_json, path, options.names, places)
    )


# Any other file is taken for one.
MANIFEST = Importer("jsonl", lambda source: True, _open, is_labels=True)
