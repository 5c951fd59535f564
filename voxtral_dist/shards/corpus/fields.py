"""The fields of a row: their names and their checks."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from voxtral_dist.data.stored.checks import Cause, UnusableError
from voxtral_dist.text.languages import language_code, warn_of_shared_code

# Three years: products with a sampling rate stay exact.
_MAX_SECONDS = 1e8


@dataclass(frozen=True)
class FieldNames:
    """Columns that may hold audio, text and language; the first one with a value counts.

    The defaults are the names of NeMo, Common Voice, DeepSpeech, Hugging Face and others.
    """

    audio: tuple[str, ...] = (
        "audio_filepath",
        "audio",
        "path",
        "file",
        "audio_file",
        "audio_path",
        "file_name",
        "audio_file_name",
        "filename",
        "wav_filename",
    )
    text: tuple[str, ...] = ("text", "sentence", "transcript", "transcription")
    language: tuple[str, ...] = ("lang", "language", "locale")

    @classmethod
    def chosen(cls, audio: str | None, text: str | None, language: str | None) -> FieldNames:
        """The given names; the defaults for those that are None."""
        usual = cls()
        return cls(
            (audio,) if audio else usual.audio,
            (text,) if text else usual.text,
            (language,) if language else usual.language,
        )

    def extra(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """All other columns of a row."""
        known = {*self.audio, *self.text, *self.language}
        return {name: value for name, value in row.items() if name not in known}


def first_of(row: Mapping[str, Any], names: Iterable[str]) -> Any:
    """The first of these fields that is not empty; None if all are."""
    return next((row[name] for name in names if row.get(name) not in (None, "")), None)


def checked_text(value: Any, names: Iterable[str]) -> str:
    """A text; a whole number is one.

    Raises:
        UnusableError: the value is no text, blank, or not Unicode.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if value is not None and not isinstance(value, str):
        shown = reprlib.repr(value)
        raise UnusableError(Cause.EMPTY_TEXT, f"has the text {shown}, which is not a string: put it in quotes")
    if value is None or not value.strip():
        raise UnusableError(Cause.EMPTY_TEXT, f"has no text: it needs one of the fields {', '.join(names)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UnusableError(Cause.MALFORMED, f"has a text that is not Unicode ({error.reason})") from error
    return value


def checked_language(value: Any, on_language: Callable[[Any], None] = warn_of_shared_code) -> str | None:
    """The ISO 639-1 code of a language or locale; None for None.

    Args:
        value: the language as it is written.
        on_language: gets it if it is known.

    Raises:
        UnusableError: the language is unknown.
    """
    try:
        code = language_code(value)
    except ValueError as error:
        raise UnusableError(Cause.UNKNOWN_LANGUAGE, str(error)) from error
    on_language(value)
    return code


def checked_seconds(row: Mapping[str, Any], name: str) -> float | None:
    """A field with seconds; None if it is empty.

    Raises:
        UnusableError: the value is not a number from 0, or is longer than any recording.
    """
    value = row.get(name)
    if value in (None, ""):
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = -1.0
    if not 0 <= seconds < _MAX_SECONDS:
        raise UnusableError(Cause.MALFORMED, f"has the {name} {reprlib.repr(value)}, which is not a number of seconds")
    return seconds
