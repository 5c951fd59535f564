"""Audio as Python code has it: paths, encoded bytes, arrays, and cells of an audio column of a `datasets.Dataset`."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.data.stored.audio import (
    AudioError,
    OnCut,
    Pcm,
    Waveform,
    decode_pcm,
    refuse_unusable_floats,
    resample,
    to_pcm,
)
from voxtral_dist.data.stored.storage import LARGEST_FILE_BYTES, read_regular

# A path, encoded bytes, an array, `{"array", "sampling_rate"}`, `{"bytes", "path"}`, or a decoder of torchcodec.
AudioInput = str | PathLike[str] | bytes | NDArray[Any] | Mapping[str, Any] | Any


def pcm_of(audio: AudioInput, sampling_rate: int, array_rate: int | None = None, on_cut: OnCut | None = None) -> Pcm:
    """int16 samples `(num_samples,)` of mono audio at a sampling rate.

    Args:
        audio: the path of an audio file; its bytes; an array `(num_samples,)` of floats in [-1, 1] or int16; or a cell
            of an audio column as `datasets` gives it: `{"array", "sampling_rate"}`, `{"bytes", "path"}`, or a decoder.
        sampling_rate: of the result, in Hz.
        array_rate: of an array that comes without its rate, in Hz; None means `sampling_rate`.
        on_cut: see `decode_audio`.

    Raises:
        AudioError: the audio does not decode, is empty, is not mono, or holds numbers that are not finite.
        OSError: the file cannot be read.
    """
    if isinstance(audio, str | PathLike):
        path = Path(audio)
        # A pipe that was named on purpose is read to its end.
        contents = read_regular(path, LARGEST_FILE_BYTES) if path.is_file() else path.read_bytes()
        return decode_pcm(contents, sampling_rate, on_cut)
    if isinstance(audio, bytes):
        return decode_pcm(audio, sampling_rate, on_cut)
    if isinstance(audio, Mapping) and audio.get("array") is None:
        encoded = audio.get("bytes")
        return pcm_of(audio["path"] if encoded is None else encoded, sampling_rate, None, on_cut)
    if isinstance(audio, Mapping) or hasattr(audio, "get_all_samples"):
        return _pcm_of_array(np.asarray(audio["array"]), int(audio["sampling_rate"]), sampling_rate)
    return _pcm_of_array(np.asarray(audio), array_rate or sampling_rate, sampling_rate)


def _pcm_of_array(array: NDArray[Any], from_rate: int, to_rate: int) -> Pcm:
    if array.ndim != 1 or array.size == 0:
        raise AudioError(f"must be an array of the shape (num_samples,), but has the shape {array.shape} instead")
    if array.dtype == np.int16 and from_rate == to_rate:
        return array
    return to_pcm(resample(_waveform(array), from_rate, to_rate))


def _waveform(array: NDArray[Any]) -> Waveform:
    if array.dtype == np.int16:
        return array.astype(np.float32) / 32768.0
    if array.dtype.kind != "f":
        raise AudioError(f"must be an array of floats in [-1, 1] or of int16, but is one of {array.dtype} instead")
    refuse_unusable_floats(array)
    return array.astype(np.float32, copy=False)
