"""One utterance made into the bytes of a shard, with all checks: the work that worker processes share."""

from __future__ import annotations

import io
import json
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import mistral_common
import soundfile
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from voxtral_dist.data.stored.audio import LONGEST_CLIP_SECONDS, AudioError, Waveform, decode_audio, to_pcm
from voxtral_dist.data.stored.checks import MAX_CHARS_PER_SECOND, Cause, UnusableError, is_silent, is_too_much_text
from voxtral_dist.data.stored.layout import AUDIO_SUFFIXES
from voxtral_dist.data.stored.shard_set import LARGEST_COUNT, UNKNOWN_LANGUAGE
from voxtral_dist.data.stored.storage import Storage, is_remote
from voxtral_dist.data.stored.tar_members import TAR_BLOCK_BYTES
from voxtral_dist.errors import first_line
from voxtral_dist.shards.tars import sample_bytes
from voxtral_dist.shards.utterances import Clip, Refusal, Utterance

# Durations are measured at the rate at which the models hear.
SAMPLING_RATE = 16_000
_LENGTH_TOLERANCE = 0.1
_LENGTH_TOLERANCE_SECONDS = 0.5

Encoding = Literal["flac"]


@dataclass(frozen=True)
class PackRules:
    """What is done to every utterance. encode: None copies the audio as it is."""

    encode: Encoding | None = None
    max_chars_per_second: float = MAX_CHARS_PER_SECOND


@dataclass(frozen=True)
class Measures:
    """What the index says of a sample besides its place."""

    duration_ms: int
    num_text_tokens: int
    num_chars: int
    language: str | None
    num_instruction_tokens: int = 0


@dataclass(frozen=True)
class UtteranceSpan:
    """Where the members of a sample lie in their tar, and the checksum of their bytes."""

    offset: int
    num_bytes: int
    crc32: int


@dataclass(frozen=True)
class PackedUtterance:
    """The tar members of one sample as bytes, and what the index says of them."""

    contents: bytes
    crc32: int
    measures: Measures


def pack_line(line: Utterance | Refusal, rules: PackRules) -> PackedUtterance | Refusal:
    """The sample of a line, or why there is none."""
    if isinstance(line, Refusal):
        return line
    try:
        return _pack(line, rules)
    except UnusableError as error:
        name = Path(line.clip.location).name if line.clip.contents is not None else line.clip.location
        return Refusal(line.place, line.key, error.cause, f"the audio {name} {error}")


def measure(utterance: Utterance, waveform: Waveform, rules: PackRules) -> Measures:
    """What the index says of an utterance with this audio at 16 kHz.

    Raises:
        UnusableError: the audio is silent, or cannot be of this text or of the claimed duration.
    """
    seconds = len(waveform) / SAMPLING_RATE
    if is_silent(waveform):
        raise UnusableError(Cause.SILENT, "is silent: it never reaches -60 dB of full scale")
    claimed = utterance.claimed_seconds
    if claimed is not None and abs(seconds - claimed) > max(_LENGTH_TOLERANCE * claimed, _LENGTH_TOLERANCE_SECONDS):
        raise UnusableError(Cause.WRONG_LENGTH, f"decodes to {seconds:.2f} s, but its source says {claimed:.2f} s")
    num_chars = len(utterance.text)
    if utterance.instruction is None and is_too_much_text(num_chars, seconds, rules.max_chars_per_second):
        raise UnusableError(
            Cause.TEXT_TOO_LONG, f"lasts {seconds:.2f} s, too short for a text of {num_chars} characters"
        )
    # Rounded up: a clip that is longer than a window by one sample needs another one.
    return Measures(
        duration_ms=-(-1000 * len(waveform) // SAMPLING_RATE),
        num_text_tokens=_count_tokens(utterance.text),
        num_chars=num_chars,
        language=utterance.language,
        num_instruction_tokens=_count_tokens(utterance.instruction or ""),
    )


def index_record(span: UtteranceSpan, measures: Measures, languages: list[str]) -> tuple[int, ...]:
    """One `RECORD`; a language that is new is appended to the table."""
    return (
        span.offset // TAR_BLOCK_BYTES,
        span.num_bytes // TAR_BLOCK_BYTES,
        measures.duration_ms,
        span.crc32,
        min(measures.num_text_tokens, LARGEST_COUNT),
        min(measures.num_chars, LARGEST_COUNT),
        _number_of(measures.language, languages),
        min(measures.num_instruction_tokens, LARGEST_COUNT),
    )


def _number_of(language: str | None, languages: list[str]) -> int:
    if language is None:
        return UNKNOWN_LANGUAGE
    if language not in languages:
        languages.append(language)
    return languages.index(language)


def _pack(utterance: Utterance, rules: PackRules) -> PackedUtterance:
    clip = utterance.clip
    audio = _cut(clip) if clip.is_part else _read(clip)
    waveform = decode_audio(audio, SAMPLING_RATE)
    measures = measure(utterance, waveform, rules)
    suffix = _suffix(clip)
    if rules.encode is not None:
        audio, suffix = _flac(to_pcm(waveform), SAMPLING_RATE, "PCM_16"), "flac"
    contents = sample_bytes(utterance.key, {suffix: audio, "json": _encode_fields(_fields(utterance))})
    return PackedUtterance(contents, zlib.crc32(contents), measures)


def _fields(utterance: Utterance) -> dict[str, Any]:
    """What the json of a sample says; columns that have our names but are not chosen get others."""
    ours: dict[str, Any] = {"text": utterance.text, "lang": utterance.language}
    if utterance.instruction is not None:
        ours["instruction"] = utterance.instruction
    others = {f"original_{name}" if name in ours else name: value for name, value in utterance.extra.items()}
    return ours | others


def _read(clip: Clip) -> bytes:
    if clip.contents is not None:
        return clip.contents
    try:
        return _storage().read_all(clip.location) if is_remote(clip.location) else Path(clip.location).read_bytes()
    except (OSError, ValueError) as error:
        raise _unreadable(error) from error


def _cut(clip: Clip) -> bytes:
    """The part of a recording, as FLAC at its own rate: only the part is read."""
    try:
        opened = (
            io.BytesIO(clip.contents) if clip.contents is not None else _storage().local_copy(clip.location).open("rb")
        )
        with opened, soundfile.SoundFile(opened) as file:
            return _cut_open(file, clip)
    except soundfile.SoundFileError as error:
        raise AudioError(f"does not decode ({first_line(error).rpartition(': ')[2]})") from error
    except (OSError, ValueError) as error:
        raise _unreadable(error) from error


def _cut_open(file: soundfile.SoundFile, clip: Clip) -> bytes:
    start = round(clip.start_seconds * file.samplerate)
    if start >= file.frames:
        claimed = f"it begins at {clip.start_seconds:.2f} s"
        raise UnusableError(Cause.WRONG_LENGTH, f"lasts {file.frames / file.samplerate:.2f} s, but {claimed} of it")
    if clip.duration_seconds is None and file.frames - start > LONGEST_CLIP_SECONDS * file.samplerate:
        raise AudioError(f"claims to be {file.frames / file.samplerate / 3600:.0f} h long", Cause.ABSURD_CLAIM)
    file.seek(start)
    num_frames = -1 if clip.duration_seconds is None else round(clip.duration_seconds * file.samplerate)
    fine = file.subtype in ("PCM_24", "PCM_32", "FLOAT", "DOUBLE")
    samples = file.read(num_frames, dtype="int32" if fine else "int16", always_2d=True)
    if clip.channel is not None:
        if clip.channel >= file.channels:
            raise UnusableError(Cause.NO_AUDIO, f"has {file.channels} channels, but not the channel {clip.channel}")
        samples = samples[:, clip.channel]
    return _flac(samples, file.samplerate, "PCM_24" if fine else "PCM_16")


@cache
def _storage() -> Storage:
    """One for all clips of a process, so that connections are used again."""
    return Storage()


def _flac(samples: Any, rate: int, subtype: str) -> bytes:
    encoded = io.BytesIO()
    soundfile.write(encoded, samples, rate, format="FLAC", subtype=subtype)
    return encoded.getvalue()


def _suffix(clip: Clip) -> str:
    if clip.is_part:
        return "flac"
    suffix = Path(clip.location).suffix.lstrip(".").lower()
    # Readers know audio members by these; libsndfile looks at the contents anyway.
    return suffix if suffix in AUDIO_SUFFIXES else "audio"


def _unreadable(error: OSError | ValueError) -> UnusableError:
    # A ValueError says that no file can have such a name.
    why = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    return UnusableError(Cause.UNREADABLE, f"cannot be read: {why}")


def _encode_fields(fields: dict[str, Any]) -> bytes:
    # Half a character has no UTF-8, but an escape in JSON.
    return json.dumps(fields, ensure_ascii=False).encode("utf-8", "backslashreplace")


def _count_tokens(text: str) -> int:
    return len(_published_vocabulary().encode(text, bos=False, eos=False))


@cache
def _published_vocabulary() -> Tekkenizer:
    """Voxtral's own, which mistral-common packages: whatever model is trained later, the index counts alike."""
    return Tekkenizer.from_file(Path(mistral_common.__file__).parent / "data" / "tekken_240911.json")
