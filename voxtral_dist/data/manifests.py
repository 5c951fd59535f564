"""Lists of utterances on disk, as one stream: usable ones, and the others with their reason."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from voxtral_dist.data.prompts import is_language_code
from voxtral_dist.errors import UserError

# Field names of NeMo, of Common Voice and of plain lists, by what they mean.
_AUDIO_FIELDS = ("audio_filepath", "audio", "path")
_TEXT_FIELDS = ("text", "sentence", "transcript")
_LANGUAGE_FIELDS = ("lang", "language", "locale")
_KNOWN_FIELDS = {*_AUDIO_FIELDS, *_TEXT_FIELDS, *_LANGUAGE_FIELDS}


@dataclass(frozen=True)
class Utterance:
    """One line of a manifest: where its audio is, and the fields that are stored as the sample's json."""

    key: str
    audio_path: Path
    fields: dict[str, Any]
    place: str


@dataclass(frozen=True)
class Refusal:
    """A line that is no utterance: where it stands and why, as one sentence."""

    reason: str


def read_manifest(path: Path) -> Iterator[Utterance | Refusal]:
    """The lines of a JSONL manifest, in its order; audio paths are relative to the manifest. Keys are made unique.

    Raises:
        UserError: the file is missing or is not UTF-8 text.
    """
    if not path.is_file():
        raise UserError(f"The manifest {path} does not exist: give a file of JSON lines with audio_filepath and text.")
    used: set[str] = set()
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _unique(_parse_line(line, path, f"{path}:{number}"), used)
    except UnicodeDecodeError as error:
        raise UserError(f"The manifest {path} is not UTF-8 text ({error.reason}): convert it first.") from error


def _unique(line: Utterance | Refusal, used: set[str]) -> Utterance | Refusal:
    """Keys name samples in reports, and WebDataset joins neighbours of one key: a repeated one gets a number."""
    if isinstance(line, Refusal):
        return line
    key, repeat = line.key, 1
    while key in used:
        repeat += 1
        key = f"{line.key}-{repeat}"
    used.add(key)
    return replace(line, key=key)


def _parse_line(line: str, manifest: Path, place: str) -> Utterance | Refusal:
    try:
        return _utterance(json.loads(line), manifest, place)
    except json.JSONDecodeError as error:
        return Refusal(f"{place}: the line is not valid JSON ({error.msg})")
    except ValueError as error:
        return Refusal(f"{place}: {error}")


def _utterance(row: Any, manifest: Path, place: str) -> Utterance:
    if not isinstance(row, dict):
        raise ValueError("the line is not a JSON object")
    audio = _first_of(row, _AUDIO_FIELDS)
    if not isinstance(audio, str) or not audio:
        raise ValueError(f"the sample names no audio: it needs one of the fields {', '.join(_AUDIO_FIELDS)}")
    text = _first_of(row, _TEXT_FIELDS)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the sample {audio} has no text: it needs one of the fields {', '.join(_TEXT_FIELDS)}")
    known = {"text": text, "lang": _language(_first_of(row, _LANGUAGE_FIELDS), audio)}
    extra = {name: value for name, value in row.items() if name not in _KNOWN_FIELDS}
    # WebDataset splits names at the first dot, and folders in keys only make tars longer.
    key = Path(audio).with_suffix("").as_posix().strip("/").replace("/", "_").replace(".", "_")
    return Utterance(key, manifest.parent / audio, known | extra, place)


def _language(value: Any, audio: str) -> str | None:
    """The ISO 639-1 part of a language or locale, such as `pt` of `pt-BR`."""
    if value is None:
        return None
    code = value.replace("_", "-").partition("-")[0].lower() if isinstance(value, str) else ""
    if not is_language_code(code):
        raise ValueError(f"the sample {audio} has the language {value!r}, which is not an ISO 639-1 code such as 'en'")
    return code


def _first_of(row: dict[str, Any], names: Iterable[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)
