"""Hypotheses on disk: the `NAME.jsonl` of an evaluation, or any JSON lines with references and hypotheses."""

from __future__ import annotations

import codecs
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from voxtral_dist.errors import UserError, lower_first
from voxtral_dist.scoring.utterances import DecodedUtterance, ScoredUtterance
from voxtral_dist.scoring.word_errors import ErrorCounts

# Prefixes of the keys of counts, such as `word_substitutions`. Counts of `biased_word` exist only with a list of words.
_COUNTED = ("word", "character", "orthographic_word", "orthographic_character", "biased_word")
_ERROR_COUNTS = TypeAdapter(ErrorCounts)


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
    for name in _COUNTED:
        counts: ErrorCounts | None = getattr(utterance, f"{name}s")
        row |= {f"{name}_{kind}": count for kind, count in (asdict(counts) if counts else {}).items()}
    return row | {"has_repetition_loop": utterance.has_repetition_loop}


def read_hypotheses(path: Path, names: Sequence[str] = ()) -> list[DecodedUtterance]:
    """Read the utterances of a file of JSON lines; blank lines are ignored.

    Args:
        path: the file. Each line has `reference` and `hypothesis`, and may have the other keys of `DecodedUtterance`.
        names: fields to keep that lie beside `fields`. Everything inside `fields` is kept.

    Raises:
        UserError: the file cannot be read or is empty, or a line is malformed; the message gives its number.
    """
    utterances = []
    for number, row in _rows(path):
        known = row.model_dump(exclude={"fields"}, exclude_unset=True)
        kept = {name: known[name] for name in names if name in known}
        utterances.append(_decoded(row, number, kept | row.fields))
    return utterances


def read_scored(path: Path) -> list[ScoredUtterance]:
    """Read the utterances of a `NAME.jsonl` with their error counts.

    Raises:
        UserError: as for `read_hypotheses`, or a line has no counts.
    """
    return [_scored(path, number, row) for number, row in _rows(path)]


def _scored(path: Path, number: int, row: _Row) -> ScoredUtterance:
    stored = row.model_extra or {}
    try:
        counts = {name: _counts(stored, name) for name in _COUNTED[:-1]}
        biased = _counts(stored, _COUNTED[-1]) if f"{_COUNTED[-1]}_substitutions" in stored else None
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
    )


def _counts(stored: Mapping[str, Any], name: str) -> ErrorCounts:
    return _ERROR_COUNTS.validate_python({one.name: stored[f"{name}_{one.name}"] for one in fields(ErrorCounts)})


def _rows(path: Path) -> Iterator[tuple[int, _Row]]:
    """The lines with their numbers, from 1, without blank ones."""
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise UserError(f"The hypotheses {path} cannot be read: {error.strerror}.") from error
    is_empty = True
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        is_empty = False
        try:
            row = _Row.model_validate_json(line)
        except ValidationError as error:
            raise UserError(f"{path}, line {number}: {_reason(error)}.") from error
        yield number, row
    if is_empty:
        raise UserError(f"The hypotheses {path} are empty: each line must be an utterance as JSON.")


def _decoded(row: _Row, number: int, kept: Mapping[str, Any]) -> DecodedUtterance:
    known = row.model_dump(include=set(_Row.model_fields)) | {"fields": kept}
    return DecodedUtterance(**known | {"utterance_id": number - 1 if row.utterance_id is None else row.utterance_id})


def _reason(error: ValidationError) -> str:
    """What is wrong with a line, as the end of a message."""
    detail = error.errors()[0]
    name = ".".join(str(part) for part in detail["loc"])
    match detail["type"]:
        case "json_invalid":
            return f"invalid JSON ({detail['ctx']['error']})"
        case "missing":
            return f"`{name}` is missing: an utterance needs `reference` and `hypothesis`"
        case "model_type" | "model_attributes_type":
            return "an utterance must be a JSON object with `reference` and `hypothesis`"
        case _:
            return f"`{name}`: {lower_first(detail['msg'])}, but is {reprlib.repr(detail['input'])} instead"
