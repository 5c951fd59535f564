"""Where the audio of an utterance is, and its bytes."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import soundfile

from voxtral_dist.data.stored.audio import LONGEST_CLIP_SECONDS, AudioError
from voxtral_dist.data.stored.checks import Cause, UnusableError
from voxtral_dist.data.stored.layout import AUDIO_SUFFIXES
from voxtral_dist.data.stored.storage import Storage, is_remote
from voxtral_dist.errors import first_line


@dataclass(frozen=True)
class AudioLocation:
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

    @property
    def suffix(self) -> str:
        """Suffix of the tar member for this audio."""
        if self.is_part:
            return "flac"
        suffix = Path(self.location).suffix.lstrip(".").lower()
        # Readers know audio members by these; libsndfile looks at the contents anyway.
        return suffix if suffix in AUDIO_SUFFIXES else "audio"

    def read(self) -> bytes:
        """Encoded audio: the file as it is, or the part as FLAC at its own sampling rate.

        Raises:
            UnusableError: it cannot be read, or has no such part.
        """
        return _cut(self) if self.is_part else _read(self)


def encode_flac(samples: Any, rate: int, subtype: str) -> bytes:
    """Samples as a FLAC file."""
    encoded = io.BytesIO()
    soundfile.write(encoded, samples, rate, format="FLAC", subtype=subtype)
    return encoded.getvalue()


def _read(audio: AudioLocation) -> bytes:
    if audio.contents is not None:
        return audio.contents
    try:
        return _storage().read_all(audio.location) if is_remote(audio.location) else Path(audio.location).read_bytes()
    except (OSError, ValueError) as error:
        raise _unreadable(error) from error


def _cut(audio: AudioLocation) -> bytes:
    """The part of a recording, as FLAC at its own rate: only the part is read."""
    try:
        opened = (
            io.BytesIO(audio.contents)
            if audio.contents is not None
            else _storage().local_copy(audio.location).open("rb")
        )
        with opened, soundfile.SoundFile(opened) as file:
            return _cut_open(file, audio)
    except soundfile.SoundFileError as error:
        raise AudioError(f"does not decode ({first_line(error).rpartition(': ')[2]})") from error
    except (OSError, ValueError) as error:
        raise _unreadable(error) from error


def _cut_open(file: soundfile.SoundFile, audio: AudioLocation) -> bytes:
    start = round(audio.start_seconds * file.samplerate)
    if start >= file.frames:
        claimed = f"it begins at {audio.start_seconds:.2f} s"
        raise UnusableError(Cause.WRONG_LENGTH, f"lasts {file.frames / file.samplerate:.2f} s, but {claimed} of it")
    if audio.duration_seconds is None and file.frames - start > LONGEST_CLIP_SECONDS * file.samplerate:
        raise AudioError(f"claims to be {file.frames / file.samplerate / 3600:.0f} h long", Cause.ABSURD_CLAIM)
    file.seek(start)
    num_frames = -1 if audio.duration_seconds is None else round(audio.duration_seconds * file.samplerate)
    fine = file.subtype in ("PCM_24", "PCM_32", "FLOAT", "DOUBLE")
    samples = file.read(num_frames, dtype="int32" if fine else "int16", always_2d=True)
    if audio.channel is not None:
        if audio.channel >= file.channels:
            raise UnusableError(Cause.NO_AUDIO, f"has {file.channels} channels, but not the channel {audio.channel}")
        samples = samples[:, audio.channel]
    return encode_flac(samples, file.samplerate, "PCM_24" if fine else "PCM_16")


@cache
def _storage() -> Storage:
    """One for all clips of a process, so that connections are used again."""
    return Storage()


def _unreadable(error: OSError | ValueError) -> UnusableError:
    # A ValueError says that no file can have such a name.
    why = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    return UnusableError(Cause.UNREADABLE, f"cannot be read: {why}")
