"""One utterance on its way into a shard, and the line of a corpus that is none, with its cause."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from voxtral_dist.data.stored.checks import Cause, UnusableError
from voxtral_dist.data.stored.storage import is_remote
from voxtral_dist.text.languages import language_code


@dataclass(frozen=True)
class Refusal:
    """An utterance that is left out: where it stands, its key as far as it is known, and why."""

    place: str
    key: str
    cause: Cause
    message: str

    @property
    def reason(self) -> str:
        """One sentence with place and cause."""
        return f"{self.place}: {self.message}"


@dataclass(frozen=True)
class Clip:
    """Where the audio of an utterance is: a file, bytes that are named like one, or a part of either.

    duration_seconds: None says to the end. channel: None keeps all.
    """

    location: str
    contents: bytes | None = None
    start_seconds: float = 0.0
    duration_seconds: float | None = None
    channel: int | None = None

    @property
    def is_part(self) -> bool:
        """Whether it has to be cut out."""
        return self.start_seconds > 0 or self.duration_seconds is not None or self.channel is not None


@dataclass(frozen=True)
class Utterance:
    """One usable line of a corpus.

    instruction: what the text answers; None where it is a transcript. claimed_seconds: the duration that the corpus
    states, if it does. extra: what else is stored in the sample's json.
    """

    key: str
    clip: Clip
    text: str
    language: str | None
    place: str
    instruction: str | None = None
    claimed_seconds: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def refusal(self, error: UnusableError) -> Refusal:
        """The utterance as one that is left out."""
        return Refusal(self.place, self.key, error.cause, str(error))


@dataclass(frozen=True)
class FieldNames:
    """Columns by what they mean; of several the first that is filled counts. NeMo's, Common Voice's and others."""

    audio: tuple[str, ...] = ("audio_filepath", "audio", "path", "file")
    text: tuple[str, ...] = ("text", "sentence", "transcript", "transcription")
    language: tuple[str, ...] = ("lang", "language", "locale")

    @classmethod
    def chosen(cls, audio: str | None, text: str | None, language: str | None) -> FieldNames:
        """The names that the user gives, and the usual ones where he gives none."""
        usual = cls()
        return cls(
            (audio,) if audio else usual.audio,
            (text,) if text else usual.text,
            (language,) if language else usual.language,
        )

    def extra(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The columns that mean none of these."""
        known = {*self.audio, *self.text, *self.language}
        return {name: value for name, value in row.items() if name not in known}


def first_of(row: Mapping[str, Any], names: Iterable[str]) -> Any:
    """The first of these fields that holds something; None if none does."""
    return next((row[name] for name in names if row.get(name) not in (None, "")), None)


def checked_text(value: Any, names: Iterable[str]) -> str:
    """The transcript.

    Raises:
        UnusableError: it is no text, or blank.
    """
    if not isinstance(value, str) or not value.strip():
        raise UnusableError(Cause.EMPTY_TEXT, f"has no text: it needs one of the fields {', '.join(names)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UnusableError(Cause.MALFORMED, f"has a text that is not Unicode ({error.reason})") from error
    return value


def checked_language(value: Any) -> str | None:
    """The ISO 639-1 code of a language or locale.

    Raises:
        UnusableError: there is no such language.
    """
    try:
        return language_code(value)
    except ValueError as error:
        raise UnusableError(Cause.UNKNOWN_LANGUAGE, str(error)) from error


def checked_seconds(row: Mapping[str, Any], name: str) -> float | None:
    """A field that holds seconds, None where it is absent.

    Raises:
        UnusableError: it is no number from 0.
    """
    value = row.get(name)
    if value in (None, ""):
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise UnusableError(Cause.MALFORMED, f"has the {name} {value!r}, which is not a number of seconds")
    return seconds


def key_of(audio: str) -> str:
    """A path as a key: WebDataset splits names at the first dot, and folders in keys only make tars longer."""
    path = audio.partition("://")[2] if is_remote(audio) else audio
    key = Path(path).with_suffix("").as_posix().strip("/").replace("/", "_").replace(".", "_") or "clip"
    return key.encode("utf-8", "replace").decode("utf-8")


def with_unique_keys(lines: Iterable[Utterance | Refusal]) -> Iterator[Utterance | Refusal]:
    """The lines; a repeated key gets a number. Keys name samples, and WebDataset joins neighbours of one key."""
    # Digests, because the keys of 100 million utterances would not fit into memory.
    used: set[int] = set()
    repeats: dict[str, int] = {}
    for line in lines:
        if isinstance(line, Refusal):
            yield line
            continue
        key, repeat = line.key, repeats.get(line.key, 1)
        while _digest(key) in used:
            repeat += 1
            key = f"{line.key}-{repeat}"
        if repeat > 1:
            repeats[line.key] = repeat
        used.add(_digest(key))
        yield replace(line, key=key)


def _digest(key: str) -> int:
    return int.from_bytes(blake2b(key.encode("utf-8"), digest_size=8).digest(), "big")
