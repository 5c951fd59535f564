"""The place of an utterance's audio, and how it is read."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
from numpy.typing import NDArray

from voxtral_dist.data.stored.audio import refuse_unusable_floats
from voxtral_dist.data.stored.audio_kinds import AUDIO_SUFFIXES, MEDIA_SUFFIXES
from voxtral_dist.data.stored.audio_source import AudioSource, opened_audio
from voxtral_dist.data.stored.checks import Cause, UnusableError
from voxtral_dist.data.stored.storage import (
    LARGEST_FILE_BYTES,
    Storage,
    is_remote,
    is_unreachable,
    open_regular,
    read_regular,
)
from voxtral_dist.errors import ReadError, UserError, first_line
from voxtral_dist.output.counting import counted
from voxtral_dist.output.masking import masked
from voxtral_dist.shards.corpus.audio_places import existing_place
from voxtral_dist.shards.corpus.perturbation import Perturbation


@dataclass(frozen=True)
class AudioLocation:
    """The audio of an utterance: a file, bytes with a file name, or a part of either.

    location: path, URL or name. contents: the bytes; None reads the file.
    start_seconds, duration_seconds: the part; a duration of None means to the end.
    channel: the only channel to keep, from 0; None keeps all.
    other_places: paths that are tried where there is nothing at `location`.
    or_whole: whether a file that is only as long as the part holds just the part, and is taken as it is.
    perturbation: a change of the samples; the part is that of the unchanged file.
    """

    location: str
    contents: bytes | None = None
    start_seconds: float = 0.0
    duration_seconds: float | None = None
    channel: int | None = None
    other_places: tuple[str, ...] = ()
    or_whole: bool = False
    perturbation: Perturbation | None = None

    def found(self) -> AudioLocation:
        """Choose the first of the places that exists; of a file that was cut before, the whole.

        Raises:
            UnusableError: there is none, or it cannot be read.
            ReadError: its storage fails.
        """
        audio = self
        if self.contents is None:
            place = existing_place((self.location, *self.other_places))
            audio = replace(self, location=place, other_places=())
        return _whole_if_cut_before(audio) if audio.or_whole else audio

    @property
    def is_part(self) -> bool:
        """Whether the audio is only a part of the file."""
        is_cut = self.start_seconds > 0 or self.duration_seconds is not None or self.channel is not None
        return is_cut or self.perturbation is not None

    @property
    def suffix(self) -> str:
        """Suffix of the tar member with this audio."""
        if self.is_part:
            return "flac"
        suffix = Path(self.location).suffix.lstrip(".").lower()
        # Readers find audio members by these suffixes; decoders look at the contents anyway.
        return suffix if suffix in AUDIO_SUFFIXES | MEDIA_SUFFIXES else "audio"

    def read(self) -> bytes:
        """The encoded audio: the file unchanged, or the part as FLAC at the sampling rate of the file.

        Raises:
            UnusableError: the file cannot be read, or has no such part.
            ReadError: its storage fails.
        """
        return _cut(self) if self.is_part else _read(self)


def encode_flac(samples: Any, rate: int, subtype: str) -> bytes:
    """The FLAC file of samples, `(num_samples,)` or `(num_samples, num_channels)`."""
    return _encode([samples], rate, samples.shape[1] if samples.ndim == 2 else 1, subtype)


def _read(audio: AudioLocation) -> bytes:
    if audio.contents is not None:
        return audio.contents
    try:
        if is_remote(audio.location):
            return _storage().read_all(audio.location, LARGEST_FILE_BYTES)
        return read_regular(Path(audio.location), LARGEST_FILE_BYTES)
    except (OSError, ValueError, UserError) as error:
        raise _unreadable(audio, error) from error


def _cut(audio: AudioLocation) -> bytes:
    """A part of a file as FLAC; the rest of the file is not decoded."""
    with _open_file(audio) as file:
        return _cut_open(file, audio)


def _opened(audio: AudioLocation) -> BinaryIO:
    if audio.contents is not None:
        return io.BytesIO(audio.contents)
    return open_regular(_storage().local_copy(audio.location))


def _cut_open(file: AudioSource, audio: AudioLocation) -> bytes:
    rate = file.sampling_rate
    start = round(audio.start_seconds * rate)
    if file.num_frames is not None and start >= file.num_frames:
        raise _begins_behind_end(audio, file.num_frames / rate)
    if audio.channel is not None and audio.channel not in range(file.num_channels):
        raise UnusableError(
            Cause.NO_AUDIO, f"has {counted(file.num_channels, 'channel')}, but not the channel {audio.channel}"
        )
    num_frames = None if audio.duration_seconds is None else round(audio.duration_seconds * rate)
    is_float = file.subtype in ("FLOAT", "DOUBLE")
    fine = is_float or file.subtype in ("PCM_24", "PCM_32")
    blocks = file.blocks("float32" if is_float else "int32" if fine else "int16", start, num_frames)
    first = next(blocks, None)
    if first is None and file.num_frames is None:
        # Only decoding told how long it is.
        raise _begins_behind_end(audio, None)
    read = blocks if first is None else chain((first,), blocks)
    chosen: Iterable[NDArray[Any]] = (
        block[:, audio.channel] if audio.channel is not None and block.ndim == 2 else block for block in read
    )
    num_channels = 1 if audio.channel is not None else file.num_channels
    if audio.perturbation is not None:
        scale = 1.0 if is_float else float(2**31 if fine else 2**15)
        samples, rate = audio.perturbation.applied(np.concatenate(list(chosen)) / scale, rate)
        chosen = [samples]
    return _encode(chosen, rate, num_channels, "PCM_24" if fine else "PCM_16")


def _begins_behind_end(audio: AudioLocation, seconds: float | None) -> UnusableError:
    lasts = "ends before" if seconds is None else f"lasts {seconds:.2f} s, but"
    return UnusableError(Cause.WRONG_LENGTH, f"{lasts} it begins at {audio.start_seconds:.2f} s of it")


def _whole_if_cut_before(audio: AudioLocation) -> AudioLocation:
    """The whole file if it is only as long as the part: rows of a corpus that was cut keep the times of its source."""
    wanted = audio.duration_seconds
    if wanted is None:
        return audio
    with _open_file(audio) as file:
        # Some formats are as long as what is decoded.
        num_frames = file.num_frames or sum(len(block) for block in file.blocks("int16", 0, None))
        length = num_frames / file.sampling_rate
    is_whole = abs(length - wanted) <= _tolerance(wanted) < audio.start_seconds + wanted - length
    return replace(audio, start_seconds=0.0, duration_seconds=None, or_whole=False) if is_whole else audio


@contextmanager
def _open_file(audio: AudioLocation) -> Iterator[AudioSource]:
    try:
        with _opened(audio) as source, opened_audio(source) as file:
            yield file
    except (OSError, ValueError, UserError) as error:
        raise _unreadable(audio, error) from error


def _tolerance(seconds: float) -> float:
    return 0.1 + 0.01 * seconds


def _encode(blocks: Iterable[NDArray[Any]], rate: int, num_channels: int, subtype: str) -> bytes:
    encoded = io.BytesIO()
    with soundfile.SoundFile(encoded, "w", rate, num_channels, subtype, format="FLAC") as file:
        for block in blocks:
            if block.dtype.kind == "f":
                refuse_unusable_floats(block)
            file.write(block)
    return encoded.getvalue()


@cache
def _storage() -> Storage:
    """The storage of this process, whose connections are reused."""
    return Storage()


def _unreadable(audio: AudioLocation, error: OSError | ValueError | UserError) -> UnusableError | ReadError:
    # A ValueError means that no file can have such a name.
    why = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    if is_unreachable(error):
        return ReadError(
            f"The audio {masked(audio.location)} cannot be read: {why}. Its storage fails, and not one utterance, so "
            "none is skipped: fix that, and rerun the same command to resume."
        )
    return UnusableError(Cause.UNREADABLE, f"cannot be read: {why}")
