"""One utterance of a corpus, checked and made into the bytes of a shard. Worker processes do this."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from voxtral_dist.data.stored.audio import decode_pcm
from voxtral_dist.data.stored.checks import MAX_CHARS_PER_SECOND, Cause, UnusableError, unusable_on_failure
from voxtral_dist.shards.corpus.audio_location import encode_flac
from voxtral_dist.shards.corpus.utterances import Refusal, Utterance
from voxtral_dist.shards.measures import SAMPLING_RATE, Measures, measure
from voxtral_dist.shards.tars.members import LARGEST_UTTERANCE_BYTES
from voxtral_dist.shards.tars.writing import utterance_bytes

Encoding = Literal["flac"]


@dataclass(frozen=True)
class PackRules:
    """How utterances are checked and stored.

    encode: audio format to store; None copies the audio unchanged.
    max_chars_per_second: a transcript with more characters per second of audio is unusable.
    """

    encode: Encoding | None = None
    max_chars_per_second: float = MAX_CHARS_PER_SECOND


@dataclass(frozen=True)
class PackedUtterance:
    """The tar members of one utterance as bytes, their CRC-32, and the measures for the index.

    cut_off: what is known of the missing end of its audio, as a sentence; None if it seems complete.
    """

    contents: bytes
    crc32: int
    measures: Measures
    cut_off: str | None = None


def pack_line(line: Utterance | Refusal, rules: PackRules) -> PackedUtterance | Refusal:
    """Pack a line of a corpus, or say why it cannot be."""
    if isinstance(line, Refusal):
        return line
    try:
        with unusable_on_failure():
            return _pack(line, rules)
    except UnusableError as error:
        return Refusal(line.place, line.key, error.cause, f"the audio {_name(line)} {error}")


def _name(line: Utterance) -> str:
    return Path(line.audio.location).name if line.audio.contents is not None else line.audio.location


def _pack(utterance: Utterance, rules: PackRules) -> PackedUtterance:
    found = utterance.audio.found()
    audio, suffix = found.read(), found.suffix
    notes: list[str] = []
    pcm = decode_pcm(audio, SAMPLING_RATE, notes.append)
    measures = measure(utterance, pcm, rules.max_chars_per_second)
    if rules.encode is not None:
        audio, suffix = encode_flac(pcm, SAMPLING_RATE, "PCM_16"), "flac"
    contents = utterance_bytes(utterance.key, {suffix: audio, "json": _encode_fields(_fields(utterance))})
    if len(contents) > LARGEST_UTTERANCE_BYTES:
        limit = f"more than {LARGEST_UTTERANCE_BYTES >> 20}"
        raise UnusableError(Cause.TOO_LARGE, f"takes {len(contents) >> 20} MiB in its tar, {limit}: pass --encode flac")
    cut_off = f"The audio {_name(utterance)} {notes[0]}." if notes else None
    return PackedUtterance(contents, zlib.crc32(contents), measures, cut_off)


def _fields(utterance: Utterance) -> dict[str, Any]:
    """The json member. Other columns named like ours get the prefix `original_`."""
    ours: dict[str, Any] = {"text": utterance.text, "lang": utterance.language}
    if utterance.instruction is not None:
        ours["instruction"] = utterance.instruction
    others = {f"original_{name}" if name in ours else name: value for name, value in utterance.extra.items()}
    return ours | others


def _encode_fields(fields: dict[str, Any]) -> bytes:
    # A lone surrogate has no UTF-8, but an escape in JSON.
    return json.dumps(fields, ensure_ascii=False).encode("utf-8", "backslashreplace")
