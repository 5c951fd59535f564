"""An utterance of a corpus, the refusal of an unusable one, and unique keys."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import PurePosixPath
from typing import Any

from voxtral_dist.data.stored.checks import Cause
from voxtral_dist.data.stored.storage import is_remote
from voxtral_dist.output.masking import MASK, masked
from voxtral_dist.shards.corpus.audio_location import AudioLocation

_LONGEST_KEY = 4096
# Of a message: rows may have megabytes in one field.
_LONGEST_MESSAGE = 1000


@dataclass(frozen=True)
class Refusal:
    """An unusable utterance: its place in the corpus, its key if it is known, and what is wrong with it."""

    place: str
    key: str
    cause: Cause
    message: str

    def __post_init__(self) -> None:
        for name in ("key", "message"):
            if len(getattr(self, name)) > _LONGEST_MESSAGE:
                object.__setattr__(self, name, f"{getattr(self, name)[:_LONGEST_MESSAGE]}...")

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
    """The key for a path: slashes and dots, at which WebDataset splits names, and NULs become underscores.

    The end of a key of thousands of characters, which no path has, is replaced by a digest.
    """
    path = PurePosixPath(masked(audio).partition("://")[2].removeprefix(f"{MASK}@") if is_remote(audio) else audio)
    without_suffix = path.with_suffix("") if path.name else path
    key = re.sub(r"[/.\0]", "_", without_suffix.as_posix().strip("/")) or "clip"
    readable = key.encode("utf-8", "replace").decode("utf-8")
    if len(readable) <= _LONGEST_KEY:
        return readable
    return f"{readable[:_LONGEST_KEY]}-{_digest(readable):016x}"


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
