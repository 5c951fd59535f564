"""Saved hypotheses: the `NAME.jsonl` of an evaluation, or any JSON lines with references and hypotheses."""

from __future__ import annotations

import codecs
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from voxtral_dist.errors import UserError, lower_first
from voxtral_dist.scoring.utterances import COUNTED, DecodedUtterance, ScoredUtterance
from voxtral_dist.scoring.word_errors import ErrorCounts

_ERROR_COUNTS = TypeAdapter(ErrorCounts)


class _Row(BaseModel):
    """What is read of a line; other keys may be fields."""

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


def read_hypotheses(path: Path, names: Sequence[str] = ()) -> list[DecodedUtterance]:
    """The utterances of a file of JSON lines; lines without any character are passed over.

    Args:
        path: the file. Each line has `reference` and `hypothesis`, and may have the other keys of `DecodedUtterance`.
        names: fields that are asked for, in `fields` or beside it. All that `fields` holds is kept.

    Raises:
        UserError: the file cannot be read or is empty, or a line is not of this form; the sentence names the line.
    """
    utterances = []
    for number, row in _rows(path):
        known = row.model_dump(exclude={"fields"}, exclude_unset=True)
        asked = {name: known[name] for name in names if name in known}
        utterances.append(_decoded(row, number, asked | row.fields))
    return utterances


def read_scored(path: Path) -> list[ScoredUtterance]:
    """The utterances of the `NAME.jsonl` of an evaluation, with the counts of their errors.

    Raises:
        UserError: as for `read_hypotheses`, or a line has no counts.
    """
    return [_scored(path, number, row) for number, row in _rows(path)]


def _scored(path: Path, number: int, row: _Row) -> ScoredUtterance:
    stored = row.model_extra or {}
    has_words = stored.get("biased_word_substitutions") is not None
    try:
        counts: dict[str, Any] = {
            f"{name}s": _counts(stored, name) for name in COUNTED if name != "biased_word" or has_words
        }
    except (KeyError, ValidationError) as error:
        raise UserError(
            f"{path}, line {number}: the counts of its errors are missing or damaged: write the file again by "
            "`voxtral-dist score --out`."
        ) from error
    has_loop = stored.get("has_repetition_loop") is True
    return ScoredUtterance(**vars(_decoded(row, number, row.fields)), **counts, has_repetition_loop=has_loop)


def _counts(stored: Mapping[str, Any], name: str) -> ErrorCounts:
    return _ERROR_COUNTS.validate_python({one.name: stored[f"{name}_{one.name}"] for one in fields(ErrorCounts)})


def _rows(path: Path) -> Iterator[tuple[int, _Row]]:
    """The lines with their numbers, from 1; blank ones are passed over."""
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


def _decoded(row: _Row, number: int, chosen: Mapping[str, Any]) -> DecodedUtterance:
    read = row.model_dump(include=set(_Row.model_fields)) | {"fields": chosen}
    return DecodedUtterance(**read | {"utterance_id": number - 1 if row.utterance_id is None else row.utterance_id})


def _reason(error: ValidationError) -> str:
    """What is wrong with a line, in the words of the sentence about it."""
    detail = error.errors()[0]
    name = ".".join(str(part) for part in detail["loc"])
    match detail["type"]:
        case "json_invalid":
            return f"this is not JSON ({detail['ctx']['error']})"
        case "missing":
            return f"`{name}` is missing: an utterance needs `reference` and `hypothesis`"
        case "model_type" | "model_attributes_type":
            return "an utterance must be a JSON object with `reference` and `hypothesis`"
        case _:
            return f"`{name}`: {lower_first(detail['msg'])}, but is {reprlib.repr(detail['input'])} instead"
