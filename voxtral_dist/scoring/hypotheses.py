"""Hypotheses on disk: the `NAME.jsonl` of an evaluation, and what other tools write."""

from __future__ import annotations

import codecs
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from voxtral_dist.errors import UserError, lower_first
from voxtral_dist.scoring.transcript_pairs import RowKeys, is_table, paired_rows, table_rows
from voxtral_dist.scoring.utterances import DecodedUtterance, ScoredUtterance
from voxtral_dist.scoring.word_errors import ErrorCounts

# Prefixes of the keys of counts, such as `word_substitutions`. Those of `biased_word` exist only with a list of words,
# those of `punctuation` not in files of earlier versions.
_COUNTED = ("word", "character", "orthographic_word", "orthographic_character")
_ERROR_COUNTS = TypeAdapter(ErrorCounts)
_OBJECT = TypeAdapter(dict[str, Any])
_NEEDED = (
    "`reference` and `hypothesis`, or NeMo's `text` and `pred_text`, or what `--reference-field` and "
    "`--hypothesis-field` name"
)


class _Row(BaseModel):
    """The keys of a line that are read; other keys can be requested as fields."""

    model_config = ConfigDict(extra="allow", strict=True)

    reference: str
    hypothesis: str
    utterance_id: int | None = None
    key: str = ""
    language: str | None = None
    duration_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    hit_limit: bool = False
    detected_language: str | None = None
    asks_for_language: bool = False
    context: str = ""
    fields: dict[str, Any] = Field(default_factory=dict)


def scored_row(utterance: ScoredUtterance) -> dict[str, Any]:
    """The line of an utterance in `NAME.jsonl`, with flat counts: `word_substitutions` and so on."""
    row = asdict(utterance.decoded)
    counted: dict[str, ErrorCounts | None] = {name: getattr(utterance, f"{name}s") for name in _COUNTED}
    counted |= {"punctuation": utterance.punctuation, "biased_word": utterance.biased_words}
    for name, counts in counted.items():
        row |= {f"{name}_{kind}": count for kind, count in (asdict(counts) if counts else {}).items()}
    return row | {"has_repetition_loop": utterance.has_repetition_loop, "has_spaces": utterance.has_spaces}


def read_hypotheses(path: Path, names: Sequence[str] = (), keys: RowKeys | None = None) -> list[DecodedUtterance]:
    """Read the utterances of JSON lines, of a table (`.csv`, `.tsv`), or of a text file beside one of references.

    Args:
        path: the file. Each row has a reference and a hypothesis, and may have the other keys of `DecodedUtterance`.
            Blank lines of JSON are ignored.
        names: fields to keep that lie beside `fields`. Everything inside `fields` is kept.
        keys: where rows have what; None takes the usual keys.

    Raises:
        UserError: the file cannot be read or is empty, or a line is malformed; the message gives its number.
    """
    utterances = []
    for number, row in _rows(path, keys or RowKeys()):
        known = row.model_dump(exclude={"fields"}, exclude_unset=True)
        kept = {name: known[name] for name in names if name in known}
        utterances.append(_decoded(row, number, kept | row.fields))
    return utterances


def read_scored(path: Path) -> list[ScoredUtterance]:
    """Read the utterances of a `NAME.jsonl` with their error counts.

    Raises:
        UserError: as for `read_hypotheses`, or a line has no counts.
    """
    return [_scored(path, number, row) for number, row in _rows(path, RowKeys())]


def _scored(path: Path, number: int, row: _Row) -> ScoredUtterance:
    stored = row.model_extra or {}
    try:
        counts = {name: _counts(stored, name) for name in _COUNTED}
        biased, punctuation = (
            _counts(stored, name) if f"{name}_substitutions" in stored else None
            for name in ("biased_word", "punctuation")
        )
        has_loop = bool(stored["has_repetition_loop"])
    except (KeyError, ValidationError) as error:
        raise UserError(
            f"{path}, line {number}: its error counts are missing or damaged: write the file again by "
            "`voxtral-dist score --out`."
        ) from error
    return ScoredUtterance(
        decoded=_decoded(row, number, row.fields),
        words=counts["word"],
        characters=counts["character"],
        orthographic_words=counts["orthographic_word"],
        orthographic_characters=counts["orthographic_character"],
        biased_words=biased,
        has_repetition_loop=has_loop,
        punctuation=punctuation,
        has_spaces=bool(stored.get("has_spaces", True)),
    )


def _counts(stored: Mapping[str, Any], name: str) -> ErrorCounts:
    return _ERROR_COUNTS.validate_python({one.name: stored[f"{name}_{one.name}"] for one in fields(ErrorCounts)})


def _rows(path: Path, keys: RowKeys) -> Iterator[tuple[int, _Row]]:
    """The rows with the numbers of their lines, from 1."""
    try:
        contents = path.read_bytes()
    except OSError as error:
        raise UserError(f"The hypotheses {path} cannot be read: {error.strerror}.") from error
    if keys.references is not None:
        found = paired_rows(keys.references, path, contents)
    elif is_table(path):
        found = table_rows(path, contents)
    else:
        found = _json_rows(path, contents)
    is_empty = True
    for number, row in found:
        is_empty = False
        try:
            yield number, _Row.model_validate(keys.canonical(row))
        except ValidationError as error:
            raise UserError(f"{path}, line {number}: {_reason(error, keys)}.") from error
    if is_empty:
        raise UserError(f"The hypotheses {path} are empty: each line must be an utterance as JSON.")


def _json_rows(path: Path, contents: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(contents.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, _OBJECT.validate_json(line)
        except ValidationError as error:
            raise UserError(f"{path}, line {number}: {_reason(error, RowKeys())}.") from error


def _decoded(row: _Row, number: int, kept: Mapping[str, Any]) -> DecodedUtterance:
    known = row.model_dump(include=set(_Row.model_fields)) | {"fields": kept}
    return DecodedUtterance(**known | {"utterance_id": number - 1 if row.utterance_id is None else row.utterance_id})


def _reason(error: ValidationError, keys: RowKeys) -> str:
    """What is wrong with a line, as the end of a message."""
    detail = error.errors()[0]
    name = ".".join(str(part) for part in detail["loc"])
    match detail["type"]:
        case "json_invalid":
            return f"invalid JSON ({detail['ctx']['error']})"
        case "missing":
            asked = getattr(keys, name, None)
            return f"`{asked or name}` is missing: an utterance needs {_NEEDED}"
        case "model_type" | "model_attributes_type" | "dict_type" if not name:
            return f"an utterance must be a JSON object with {_NEEDED}"
        case _:
            return f"`{name}`: {lower_first(detail['msg'])}, but is {reprlib.repr(detail['input'])} instead"
