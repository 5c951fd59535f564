"""Labels in a temporary file, found by the name of their audio: they need not fit into memory."""

from __future__ import annotations

import pickle
import tempfile
import unicodedata
from array import array
from collections.abc import Iterator
from dataclasses import replace
from hashlib import blake2b
from pathlib import PurePosixPath

from voxtral_dist.data.stored.checks import Cause
from voxtral_dist.shards.corpus.suffixes import AUDIO_FILE_SUFFIXES
from voxtral_dist.shards.corpus.utterances import Line, Refusal, Utterance, key_of


class LabelSpool:
    """Utterances without their audio, which is found later.

    Names are compared without folders where that leaves no doubt, and without suffixes. A group, such as a shard, has
    names of its own.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the spool)
        self._offsets = array("Q")
        self._used = bytearray()
        self._numbers: dict[int, tuple[int, ...]] = {}
        self._paths_of_names: dict[int, set[int]] = {}
        self._refused: set[int] = set()

    def add(self, line: Line, name: str, group: str = "") -> None:
        """Keep a label for the audio with this name; of a refusal, only that its audio is not missing a label."""
        if isinstance(line, Refusal):
            self._refused.add(_digest(group, line.key))
            return
        path = _plain(name)
        exact, last = _digest(group, path), _digest(group, PurePosixPath(path).name)
        self._numbers[exact] = (*self._numbers.get(exact, ()), len(self._offsets))
        self._paths_of_names.setdefault(last, set()).add(exact)
        self._offsets.append(self._file.seek(0, 2))
        self._used.append(0)
        pickle.dump(line, self._file)

    def take(self, name: str, group: str = "") -> list[Utterance]:
        """The labels of an audio file; none if it has none, or was taken before."""
        numbers = self._find(_plain(name), group)
        taken = [self._load(number) for number in numbers if not self._used[number]]
        for number in numbers:
            self._used[number] = 1
        return taken

    def why_without(self, name: str, group: str = "") -> str | None:
        """Why `take` found no label; None if it was refused."""
        keys = {_digest(group, key_of(path)) for path in (name, PurePosixPath(name).name)}
        if keys & self._refused:
            return None
        path = _plain(name)
        if self._find(path, group):
            return "is the second with this name: its label was used"
        if len(self._paths_of_names.get(_digest(group, PurePosixPath(path).name), ())) > 1:
            return "may have one of several labels, whose names differ only in their folders"
        return "has no label of its name"

    def unused(self) -> Iterator[Utterance]:
        """The labels whose audio was not found."""
        for number, is_used in enumerate(self._used):
            if not is_used:
                yield self._load(number)

    def _find(self, path: str, group: str) -> tuple[int, ...]:
        parts = PurePosixPath(path).parts
        for start in range(len(parts)):
            found = self._numbers.get(_digest(group, "/".join(parts[start:])))
            if found is not None:
                return found
        candidates = self._paths_of_names.get(_digest(group, parts[-1] if parts else ""), set())
        return self._numbers[next(iter(candidates))] if len(candidates) == 1 else ()

    def _load(self, number: int) -> Utterance:
        self._file.seek(self._offsets[number])
        loaded: Utterance = pickle.load(self._file)
        return loaded


def joined(spool: LabelSpool, name: str, contents: bytes, place: str, group: str = "") -> Iterator[Line]:
    """The utterances of an audio file by its labels, or the refusal of one without any."""
    labels = spool.take(name, group)
    for label in labels:
        yield replace(label, audio=replace(label.audio, location=name, contents=contents, other_places=()))
    if not labels and (reason := spool.why_without(name, group)) is not None:
        yield Refusal(place, key_of(name), Cause.EMPTY_TEXT, f"the audio {name} {reason}")


def without_audio(spool: LabelSpool, where: str) -> Iterator[Refusal]:
    """Refusals of the labels whose audio was not found."""
    for label in spool.unused():
        message = f"the utterance {label.audio.location} names no audio in {where}"
        yield Refusal(label.place, label.key, Cause.NO_AUDIO, message)


def _plain(name: str) -> str:
    """The name of audio without a suffix of audio, in one Unicode form."""
    path = PurePosixPath(unicodedata.normalize("NFC", name.replace("\\", "/")))
    return str(path.with_suffix("") if path.suffix.lower() in AUDIO_FILE_SUFFIXES else path).lstrip("/")


def _digest(group: str, name: str) -> int:
    named = f"{group}\0{name}".encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(named, digest_size=8).digest(), "big")
