"""One utterance of a corpus, the refusal of one that cannot be used, and their keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from voxtral_dist.data.stored.checks import Cause, UnusableError
from voxtral_dist.data.stored.storage import is_remote
from voxtral_dist.shards.corpus.audio_location import AudioLocation


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
class Utterance:
    """One usable line of a corpus.

    instruction: what the text answers; None where it is a transcript. claimed_seconds: the duration that the corpus
    states, if it does. extra: what else is stored in the sample's json.
    """

    key: str
    audio: AudioLocation
    text: str
    language: str | None
    place: str
    instruction: str | None = None
    claimed_seconds: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def refusal(self, error: UnusableError) -> Refusal:
        """The utterance as one that is left out."""
        return Refusal(self.place, self.key, error.cause, str(error))


Line = Utterance | Refusal


def key_of(audio: str) -> str:
    """A path as a key: WebDataset splits names at the first dot, and folders in keys only make tars longer."""
    path = audio.partition("://")[2] if is_remote(audio) else audio
    key = Path(path).with_suffix("").as_posix().strip("/").replace("/", "_").replace(".", "_") or "clip"
    return key.encode("utf-8", "replace").decode("utf-8")


def with_unique_keys(lines: Iterable[Line]) -> Iterator[Line]:
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
