"""Long recordings in parts that begin and end where nobody speaks, as far as loudness tells."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.data.stored.audio import Pcm

# Loudness is that of as much audio: shorter than pauses between sentences, longer than those inside of words.
_FRAME_SECONDS = 0.02
_SMOOTHED_FRAMES = 15
# A cut lies in the last half of what a part may last, so that parts are long: more context, and fewer cuts.
_EARLIEST_CUT = 0.5


def cut_at_pauses(pcm: Pcm, sampling_rate: int, max_seconds: float) -> Iterator[slice]:
    """The parts of a recording, none longer than `max_seconds`, each cut at the quietest place of its last half.

    Args:
        pcm: int16 `(num_samples,)`, at least one.
        sampling_rate: in Hz.
        max_seconds: of a part.

    Yields:
        Neighbouring slices of samples that cover the recording.
    """
    if len(pcm) <= max_seconds * sampling_rate:
        yield slice(0, len(pcm))
        return
    frame = round(_FRAME_SECONDS * sampling_rate)
    most = max(2, int(max_seconds * sampling_rate) // frame)
    loudness = _loudness(pcm, frame)
    start = 0
    while len(loudness) - start > most:
        earliest = start + max(1, int(_EARLIEST_CUT * most))
        end = earliest + int(loudness[earliest : start + most].argmin())
        yield slice(start * frame, end * frame)
        start = end
    yield slice(start * frame, len(pcm))


def _loudness(pcm: Pcm, frame: int) -> NDArray[np.float64]:
    """The mean power around each frame, `(num_frames,)`; the last one may be shorter."""
    num_whole = len(pcm) // frame
    frames = pcm[: num_whole * frame].reshape(-1, frame)
    power = np.einsum("ij,ij->i", frames, frames, dtype=np.float64) / frame
    if (rest := pcm[num_whole * frame :]).size:
        power = np.append(power, np.square(rest.astype(np.float64)).sum() / frame)
    smoothed: NDArray[np.float64] = np.convolve(power, np.full(_SMOOTHED_FRAMES, 1 / _SMOOTHED_FRAMES), mode="same")
    return smoothed[: len(power)]
