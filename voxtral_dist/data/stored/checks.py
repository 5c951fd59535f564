"""What no utterance can be: of another length than its index says, silent, or with more text than anybody says."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# 60 dB below full scale: the noise of a microphone in a quiet room is louder.
_SILENT_PEAK = 0.001
# Nobody speaks so fast in any script; fast English has about 20.
MAX_CHARS_PER_SECOND = 40.0
# Texts up to this length are never too long: short clips are often cut tighter than their words.
ALWAYS_POSSIBLE_CHARS = 50
_DURATION_TOLERANCE_SECONDS = 0.1


def is_same_duration(seconds: float, expected_seconds: float) -> bool:
    """Whether decoded audio is as long as its index says, but for what encoders pad and headers round."""
    return abs(seconds - expected_seconds) <= _DURATION_TOLERANCE_SECONDS + 0.01 * expected_seconds


def is_silent(audio: NDArray[Any]) -> bool:
    """Whether samples, float in [-1, 1] or int16, never reach -60 dB of full scale."""
    full_scale = 32768.0 if audio.dtype == np.int16 else 1.0
    loudest = max(float(audio.max(initial=0)), -float(audio.min(initial=0)))
    return loudest < _SILENT_PEAK * full_scale


def is_too_much_text(num_chars: int, duration_seconds: float, max_chars_per_second: float) -> bool:
    """Whether a text cannot be what is said in so short a time."""
    return num_chars > max(max_chars_per_second * duration_seconds, ALWAYS_POSSIBLE_CHARS)
