"""The place of an utterance's audio, and how it is read."""

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
    """The audio of an utterance: a file, bytes with a file name, or a part of either.

    location: path, URL or name. contents: the bytes; None reads the file.
    start_seconds, duration_seconds: the part; a duration of None means to the end.
    channel: the only channel to keep, from 0; None keeps all.
    """

    location: str
    contents: bytes | None = None
    start_seconds: float = 0.0
    duration_seconds: float | None = None
    channel: int | None = None

    @property
    def is_part(self) -> bool:
        """Whether the audio is only a part of the file."""
        return self.start_seconds > 0 or self.duration_seconds is not None or self.channel is not None

    @property
    def suffix(self) -> str:
        """Suffix of the tar member with this audio."""
        if self.is_part:
            return "flac"
        suffix = Path(self.location).suffix.lstrip(".").lower()
        # Readers find audio members by these suffixes; libsndfile looks at the contents anyway.
        return suffix if suffix in AUDIO_SUFFIXES else "audio"

    def read(self) -> bytes:
        """The encoded audio: the file unchanged, or the part as FLAC at the sampling rate of the file.

        Raises:
            UnusableError: the file cannot be read, or has no such part.
        """
        return _cut(self) if self.is_part else _read(self)


def encode_flac(samples: Any, rate: int, subtype: str) -> bytes:
    """The FLAC file of samples, `(num_samples,)` or `(num_samples, num_channels)`."""
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
    """A part of a file as FLAC; the rest of the file is not decoded."""
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
    """The storage of this process, whose connections are reused."""
    return Storage()


def _unreadable(error: OSError | ValueError) -> UnusableError:
    # A ValueError means that no file can have such a name.
    why = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    return UnusableError(Cause.UNREADABLE, f"cannot be read: {why}")
