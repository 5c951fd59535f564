"""Decode audio to mono float32 at the model's sampling rate, or to the int16 that data workers send."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import soxr
from numpy.typing import NDArray

from voxtral_dist.data.stored.audio_source import LONGEST_CLIP_SECONDS, AudioSource, opened_audio
from voxtral_dist.data.stored.audio_source import AudioError as AudioError
from voxtral_dist.data.stored.checks import Cause

Waveform = NDArray[np.float32]
Pcm = NDArray[np.int16]

_INT16_SCALE = 32768.0
# 18 dB above full scale: mixes exceed it by less, and integers stored as floats by far more.
_LARGEST_SAMPLE = 8.0
# Power of the mean of all channels, divided by the mean of their powers. Independent channels have 1/2 for two of them.
_CANCELLED = 0.01

OnCut = Callable[[str], None]


def decode_audio(contents: bytes, sampling_rate: int, on_cut: OnCut | None = None) -> Waveform:
    """Decode any audio file to a mono waveform `(num_samples,)` at `sampling_rate` Hz, in [-1, 1] unless it is float.

    Several channels are averaged. If they cancel each other, as where one is wired the wrong way round, the loudest is
    taken.

    Args:
        contents: of a file that libsndfile decodes, or FFmpeg if PyAV is installed.
        sampling_rate: of the result, in Hz.
        on_cut: called with a predicate if the audio ends before the file says it does.

    Raises:
        AudioError: the bytes do not decode, contain no samples, or contain samples that are not finite or far beyond
            full scale.
    """
    with opened_audio(io.BytesIO(contents)) as file:
        mix = _Mix(file)
        waveform: Waveform = _joined(mix.blocks(sampling_rate), np.dtype(np.float32))
        _report(file, on_cut)
    channel = mix.loudest_if_cancelled()
    if channel is None:
        return waveform
    with opened_audio(io.BytesIO(contents)) as file:
        one: Waveform = _joined(_Mix(file, channel).blocks(sampling_rate), np.dtype(np.float32))
        return one


def decode_pcm(contents: bytes, sampling_rate: int, on_cut: OnCut | None = None) -> Pcm:
    """`to_pcm(decode_audio(...))`, but without conversion to float if the audio is 16-bit mono of this rate.

    Raises:
        AudioError: as `decode_audio`.
    """
    with opened_audio(io.BytesIO(contents)) as file:
        is_plain = (file.sampling_rate, file.num_channels, file.subtype) == (sampling_rate, 1, "PCM_16")
        mix = _Mix(file)
        blocks = _bounded(file, "int16") if is_plain else map(to_pcm, mix.blocks(sampling_rate))
        pcm: Pcm = _joined(blocks, np.dtype(np.int16))
        _report(file, on_cut)
    channel = mix.loudest_if_cancelled()
    if channel is None:
        return pcm
    with opened_audio(io.BytesIO(contents)) as file:
        one: Pcm = _joined(map(to_pcm, _Mix(file, channel).blocks(sampling_rate)), np.dtype(np.int16))
        return one


def _report(file: AudioSource, on_cut: OnCut | None) -> None:
    if on_cut is not None and file.cut_off is not None:
        on_cut(file.cut_off)


def _bounded(file: AudioSource, dtype: str) -> Iterator[NDArray[Any]]:
    """The blocks of a file that turns out not to be longer than the longest clip."""
    num_frames = 0
    for block in file.blocks(dtype):
        num_frames += len(block)
        if num_frames > LONGEST_CLIP_SECONDS * file.sampling_rate:
            longest = LONGEST_CLIP_SECONDS / 3600
            raise AudioError(f"is longer than the limit of {longest:.0f} h", Cause.ABSURD_CLAIM)
        yield block


class _Mix:
    """The channels of a file as one: their mean, or one of them."""

    def __init__(self, file: AudioSource, channel: int | None = None) -> None:
        self._file = file
        self._channel = channel
        self._mean_power = 0.0
        self._powers = np.zeros(file.num_channels)

    def blocks(self, sampling_rate: int) -> Iterator[Waveform]:
        """Blocks at `sampling_rate` Hz; together they equal the whole, resampled at once."""
        stream = None
        if self._file.sampling_rate != sampling_rate:
            stream = soxr.ResampleStream(self._file.sampling_rate, sampling_rate, 1, dtype="float32", quality="HQ")
        for block in _bounded(self._file, "float32"):
            refuse_unusable_floats(block)
            mono = block if block.ndim == 1 else self._mixed(block)
            yield mono if stream is None else stream.resample_chunk(mono)
        if stream is not None:
            yield stream.resample_chunk(np.zeros(0, dtype=np.float32), last=True)

    def _mixed(self, block: NDArray[np.float32]) -> Waveform:
        if self._channel is not None:
            return np.ascontiguousarray(block[:, self._channel])
        mono: Waveform = block.mean(axis=1)
        self._mean_power += float(np.dot(mono, mono))
        self._powers += np.einsum("ij,ij->j", block, block)
        return mono

    def loudest_if_cancelled(self) -> int | None:
        """The loudest channel if the mean of all has next to none of their power; else None."""
        if self._mean_power >= _CANCELLED * float(self._powers.mean()):
            return None
        return int(self._powers.argmax())


def refuse_unusable_floats(samples: NDArray[Any]) -> None:
    """Refuse float samples that are not finite, or far beyond full scale, which is 1: clipped, they would be noise.

    Raises:
        AudioError: a sample is.
    """
    if not np.isfinite(samples).all():
        raise AudioError("contains samples that are not finite", Cause.NOT_FINITE)
    largest = max(float(samples.max(initial=0)), -float(samples.min(initial=0)))
    if largest > _LARGEST_SAMPLE:
        raise AudioError(
            f"has float samples up to {largest:.5g}, where 1 is full scale: integers were stored as floats; divide "
            "them by 32768, or write them as integers",
            Cause.BEYOND_FULL_SCALE,
        )


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
