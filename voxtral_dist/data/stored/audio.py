"""Decode audio to mono float32 at the model's sampling rate, or to the int16 that data workers send."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from voxtral_dist.data.stored.checks import Cause, UnusableError

Waveform = NDArray[np.float32]
Pcm = NDArray[np.int16]

_INT16_SCALE = 32768.0
LONGEST_CLIP_SECONDS = 6 * 3600
# From telephones to studios; a damaged header may claim anything.
_RATES = range(4_000, 96_001)
# Decoded at a time, over all channels: more than an utterance of a minute.
_BLOCK_SAMPLES = 2**20


class AudioError(UnusableError):
    """The audio of an utterance is unusable. As in `UnusableError`, the message is a predicate."""

    def __init__(self, message: str, cause: Cause = Cause.UNDECODABLE) -> None:
        super().__init__(cause, message)


def decode_audio(contents: bytes, sampling_rate: int) -> Waveform:
    """Decode any format that libsndfile reads to a mono waveform `(num_samples,)` in [-1, 1] at `sampling_rate` Hz.

    Raises:
        AudioError: the bytes do not decode, contain no samples, or contain samples that are not finite.
    """
    with opened_audio(io.BytesIO(contents)) as file:
        waveform: Waveform = _joined(_mono_blocks(file, sampling_rate), np.dtype(np.float32))
        return waveform


def decode_pcm(contents: bytes, sampling_rate: int) -> Pcm:
    """`to_pcm(decode_audio(...))`, but without conversion to float if the audio is 16-bit mono of this rate.

    Raises:
        AudioError: as `decode_audio`.
    """
    with opened_audio(io.BytesIO(contents)) as file:
        is_plain = (file.samplerate, file.channels, file.subtype) == (sampling_rate, 1, "PCM_16")
        blocks = audio_blocks(file, "int16") if is_plain else map(to_pcm, _mono_blocks(file, sampling_rate))
        pcm: Pcm = _joined(blocks, np.dtype(np.int16))
        return pcm


@contextmanager
def opened_audio(source: BinaryIO) -> Iterator[soundfile.SoundFile]:
    """Open audio whose header claims neither an absurd length nor an absurd rate.

    Raises:
        AudioError: it does not, or cannot be decoded inside the block.
    """
    try:
        with soundfile.SoundFile(source) as file:
            # A damaged header may claim anything, and some formats store silence in almost no bytes.
            if file.frames > LONGEST_CLIP_SECONDS * file.samplerate:
                claimed, longest = file.frames / file.samplerate / 3600, LONGEST_CLIP_SECONDS / 3600
                message = f"claims to be {claimed:.0f} h long, more than the limit of {longest:.0f} h"
                raise AudioError(message, Cause.ABSURD_CLAIM)
            if file.samplerate not in _RATES:
                raise AudioError(f"claims a sampling rate of {file.samplerate} Hz", Cause.ABSURD_CLAIM)
            yield file
    except (soundfile.SoundFileError, ValueError, TypeError) as error:
        # libsndfile names the object in memory before the reason.
        reason = str(error).rpartition(": ")[2].removesuffix(".")
        raise AudioError(f"does not decode ({reason})") from error


def audio_blocks(file: soundfile.SoundFile, dtype: str, num_frames: int | None = None) -> Iterator[NDArray[Any]]:
    """The samples of a file from its position on, `(num_frames,)`, or `(num_frames, num_channels)` of several channels.

    They come in blocks of limited size: memory depends on what a file holds, and not on what its header claims.
    `num_frames` limits their number.
    """
    left = file.frames if num_frames is None else num_frames
    while left > 0:
        asked = min(left, max(1, _BLOCK_SAMPLES // file.channels))
        block: NDArray[Any] = file.read(asked, dtype=dtype)
        yield block
        left = left - asked if len(block) == asked else 0


def _mono_blocks(file: soundfile.SoundFile, sampling_rate: int) -> Iterator[Waveform]:
    """Blocks of a mono waveform at `sampling_rate` Hz; together they equal the whole, resampled at once."""
    stream = None
    if file.samplerate != sampling_rate:
        stream = soxr.ResampleStream(file.samplerate, sampling_rate, 1, dtype="float32", quality="HQ")
    for block in audio_blocks(file, "float32"):
        mono: Waveform = block if block.ndim == 1 else block.mean(axis=1)
        if not np.isfinite(mono).all():
            raise AudioError("contains samples that are not finite", Cause.NOT_FINITE)
        yield mono if stream is None else stream.resample_chunk(mono)
    if stream is not None:
        yield stream.resample_chunk(np.zeros(0, dtype=np.float32), last=True)


def _joined(blocks: Iterator[NDArray[Any]], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The samples of all blocks.

    Raises:
        AudioError: there are none.
    """
    first = next(blocks, np.zeros(0, dtype))
    rest = next(blocks, None)
    if rest is None:
        joined = first
    else:
        # A bytearray grows in place; to concatenate blocks takes twice the memory.
        contents = bytearray(first.tobytes())
        while rest is not None:
            contents += rest.tobytes()
            rest = next(blocks, None)
        joined = np.frombuffer(contents, dtype)
    if len(joined) == 0:
        raise AudioError("contains no audio", Cause.EMPTY_AUDIO)
    return joined


def resample(waveform: Waveform, from_rate: int, to_rate: int) -> Waveform:
    """Resample a waveform with the filter of mistral-common, so that training and inference get the same audio."""
    if from_rate == to_rate:
        return waveform
    resampled: Waveform = soxr.resample(waveform, from_rate, to_rate, quality="HQ").astype(np.float32)
    return resampled


def to_pcm(waveform: Waveform) -> Pcm:
    """Convert to 16-bit samples: lossless for audio that was 16-bit, and half the bytes of float32."""
    scaled = np.rint(waveform * _INT16_SCALE)
    pcm: Pcm = np.clip(scaled, -_INT16_SCALE, _INT16_SCALE - 1).astype(np.int16)
    return pcm
