"""An utterance of a corpus, the refusal of an unusable one, and unique keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from voxtral_dist.data.stored.checks import Cause
from voxtral_dist.data.stored.storage import is_remote
from voxtral_dist.shards.corpus.audio_location import AudioLocation


@dataclass(frozen=True)
class Refusal:
    """An unusable utterance: its place in the corpus, its key if it is known, and what is wrong with it."""

    place: str
    key: str
    cause: Cause
    message: str

    @property
    def reason(self) -> str:
        """Place and message, for a reader."""
        return f"{self.place}: {self.message}"


@dataclass(frozen=True)
class Utterance:
    """One usable line of a corpus.

    language: an ISO 639-1 code; None if unknown. place: where the corpus has it, for messages.
    instruction: what the text answers; None for a transcript.
    claimed_seconds: the duration according to the corpus; None if it gives none.
    extra: other fields, stored in the json member.
    """

    key: str
    audio: AudioLocation
    text: str
    language: str | None
    place: str
    instruction: str | None = None
    claimed_seconds: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


Line = Utterance | Refusal


def key_of(audio: str) -> str:
    """The key for a path: slashes and dots, at which WebDataset splits names, become underscores."""
    path = audio.partition("://")[2] if is_remote(audio) else audio
    key = Path(path).with_suffix("").as_posix().strip("/").replace("/", "_").replace(".", "_") or "clip"
    return key.encode("utf-8", "replace").decode("utf-8")


def with_unique_keys(lines: Iterable[Line]) -> Iterator[Line]:
    """The lines, with a number added to repeated keys: WebDataset joins neighbours with the same key."""
    # Digests: the keys of 100 million utterances would not fit into memory.
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
