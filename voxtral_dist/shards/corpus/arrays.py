"""Audio as an array of samples, as mapped datasets store it."""

from __future__ import annotations

import reprlib
from typing import Any

import numpy as np

from voxtral_dist.data.stored.checks import Cause, UnusableError
from voxtral_dist.shards.corpus.audio_location import encode_flac

_INT16_SCALE = 2**15
_INT24_SCALE = 2**23


def encoded_array(samples: Any, rate: Any) -> bytes:
    """The FLAC file of samples in [-1, 1] or of 16-bit samples, `(num_samples,)` or `(num_channels, num_samples)`.

    Samples that were of 16 bits keep their values; others have 24.

    Raises:
        UnusableError: they are no samples, or have no sampling rate.
    """
    if isinstance(rate, float) and rate.is_integer():
        rate = int(rate)
    if isinstance(rate, bool) or not isinstance(rate, int) or rate <= 0:
        shown = reprlib.repr(rate)
        raise UnusableError(Cause.NO_AUDIO, f"has audio that is an array, but its sampling_rate is {shown}")
    try:
        array = np.asarray(samples)
    except ValueError as error:
        raise UnusableError(Cause.MALFORMED, "has an array of audio whose channels differ in length") from error
    if array.ndim not in (1, 2) or array.size == 0 or array.dtype.kind not in "iuf":
        raise UnusableError(Cause.MALFORMED, f"has an array of audio with the shape {array.shape} of {array.dtype}")
    if array.ndim == 2:
        array = array if array.shape[0] > array.shape[1] else array.T
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise UnusableError(Cause.NOT_FINITE, "has an array of audio with samples that are not finite")
        array = array.astype(np.float64)
    elif np.abs(array.astype(np.int64)).max() <= _INT16_SCALE:
        array = array / _INT16_SCALE
    if np.abs(array).max() > 1.01:
        raise UnusableError(Cause.MALFORMED, f"has an array of audio that reaches {np.abs(array).max():g}, far above 1")
    is_16_bit = bool((np.rint(array * _INT16_SCALE) == array * _INT16_SCALE).all())
    scale, subtype, shift = (_INT16_SCALE, "PCM_16", 16) if is_16_bit else (_INT24_SCALE, "PCM_24", 8)
    fixed = np.clip(np.rint(array * scale), -scale, scale - 1).astype(np.int32) << shift
    return encode_flac(fixed, rate, subtype)
