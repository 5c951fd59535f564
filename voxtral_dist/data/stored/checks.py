"""Why an utterance cannot be used, and the checks of its audio and text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.errors import UserError, first_line

# 60 dB below full scale: the noise of a microphone in a quiet room is louder.
_SILENT_PEAK = 0.001
# Nobody speaks so fast in any script; fast English has about 20.
MAX_CHARS_PER_SECOND = 40.0
# Texts up to this length are never too long: short clips are often cut tighter than their words.
ALWAYS_POSSIBLE_CHARS = 50
_DURATION_TOLERANCE_SECONDS = 0.1


class Cause(StrEnum):
    """Why an utterance is unusable: the key under which it is counted."""

    NOT_JSON = "not JSON"
    MALFORMED = "malformed row"
    NO_AUDIO = "no audio named"
    UNREADABLE = "unreadable"
    UNDECODABLE = "undecodable"
    EMPTY_AUDIO = "empty audio"
    SILENT = "silent"
    NOT_FINITE = "not finite"
    ABSURD_CLAIM = "absurd claim"
    BEYOND_FULL_SCALE = "beyond full scale"
    TOO_LARGE = "too large"
    WRONG_LENGTH = "wrong length"
    EMPTY_TEXT = "empty text"
    TEXT_TOO_LONG = "text too long for its audio"
    NO_INSTRUCTION = "no instruction"
    UNKNOWN_LANGUAGE = "unknown language"
    DAMAGED_TAR = "damaged tar"
    WRONG_INDEX = "differs from its index"


class UnusableError(Exception):
    """An utterance cannot be used. The message is a predicate: callers put the utterance's name before it."""

    def __init__(self, cause: Cause, message: str) -> None:
        super().__init__(message)
        self.cause = cause


@contextmanager
def unusable_on_failure(cause: Cause = Cause.MALFORMED) -> Iterator[None]:
    """Turn any failure of the block, which handles one utterance, into an `UnusableError`.

    Parsers of damaged or hostile bytes raise errors of any type, whatever their documentation lists, and one utterance
    must not end a command that reads millions. A `UserError` passes: it is about the command.

    Args:
        cause: of failures that are no errors of the system.

    Raises:
        UnusableError: in place of any other exception.
    """
    try:
        yield
    except (UnusableError, UserError):
        raise
    except OSError as error:
        raise UnusableError(Cause.UNREADABLE, f"cannot be read: {error.strerror or first_line(error)}") from error
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error)}".removesuffix(": ")
        raise UnusableError(cause, f"cannot be used ({what})") from error


def is_same_duration(seconds: float, expected_seconds: float) -> bool:
    """Whether decoded audio is as long as its index says, within 0.1 s + 1 % for encoder padding and rounding."""
    return abs(seconds - expected_seconds) <= _DURATION_TOLERANCE_SECONDS + 0.01 * expected_seconds


def is_silent(audio: NDArray[Any]) -> bool:
    """Whether a waveform, float in [-1, 1] or int16, stays within -60 dB of full scale around a constant.

    A constant is silence, and so is noise that a direct current lifts.
    """
    if audio.size == 0:
        return True
    full_scale = 32768.0 if audio.dtype == np.int16 else 1.0
    return float(audio.max()) - float(audio.min()) < 2 * _SILENT_PEAK * full_scale


def is_too_much_text(num_chars: int, duration_seconds: float, max_chars_per_second: float) -> bool:
    """Whether a text is too long to be spoken in this time."""
    return num_chars > max(max_chars_per_second * duration_seconds, ALWAYS_POSSIBLE_CHARS)
