"""Decode audio to mono float32 at the model's sampling rate, or to the int16 that data workers send."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

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


class AudioError(UnusableError):
    """The audio of an utterance is unusable. As in `UnusableError`, the message is a predicate."""

    def __init__(self, message: str, cause: Cause = Cause.UNDECODABLE) -> None:
        super().__init__(cause, message)


def decode_audio(contents: bytes, sampling_rate: int) -> Waveform:
    """Decode any format that libsndfile reads to a mono waveform `(num_samples,)` in [-1, 1] at `sampling_rate` Hz.

    Raises:
        AudioError: the bytes do not decode, contain no samples, or contain samples that are not finite.
    """
    with _opened(contents) as file:
        return _decode(file, sampling_rate)


def decode_pcm(contents: bytes, sampling_rate: int) -> Pcm:
    """`to_pcm(decode_audio(...))`, but without conversion to float if the audio is 16-bit mono of this rate.

    Raises:
        AudioError: as `decode_audio`.
    """
    with _opened(contents) as file:
        if (file.samplerate, file.channels, file.subtype) != (sampling_rate, 1, "PCM_16"):
            return to_pcm(_decode(file, sampling_rate))
        pcm: Pcm = file.read(dtype="int16")
        if len(pcm) == 0:
            raise AudioError("contains no audio", Cause.EMPTY_AUDIO)
        return pcm


@contextmanager
def _opened(contents: bytes) -> Iterator[soundfile.SoundFile]:
    try:
        with soundfile.SoundFile(io.BytesIO(contents)) as file:
            # A damaged header may claim any length, and libsndfile allocates memory for it.
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


def _decode(file: soundfile.SoundFile, sampling_rate: int) -> Waveform:
    waveform = file.read(dtype="float32", always_2d=True)
    mono: Waveform = waveform.mean(axis=1) if waveform.shape[1] > 1 else waveform[:, 0]
    if len(mono) == 0:
        raise AudioError("contains no audio", Cause.EMPTY_AUDIO)
    if not np.isfinite(mono).all():
        raise AudioError("contains samples that are not finite", Cause.NOT_FINITE)
    return resample(mono, file.samplerate, sampling_rate)


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
