"""Changes of a recording's samples that a manifest of Lhotse asks for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import soxr
from numpy.typing import NDArray


@dataclass(frozen=True)
class Perturbation:
    """Speed, loudness and sampling rate of a recording, changed when it is read.

    speed: how much faster the audio is played, which also raises its pitch. gain: factor of the amplitude.
    rate: sampling rate in Hz to which it is resampled; None keeps that of the file.
    """

    speed: float = 1.0
    gain: float = 1.0
    rate: int | None = None

    def applied(self, samples: NDArray[np.float64], rate: int) -> tuple[NDArray[np.float64], int]:
        """The changed samples, `(num_samples,)` or `(num_samples, num_channels)`, and their sampling rate in Hz."""
        if self.speed != 1:
            samples = soxr.resample(samples, rate * self.speed, rate, quality="HQ")
        if self.rate is not None and self.rate != rate:
            samples, rate = soxr.resample(samples, rate, self.rate, quality="HQ"), self.rate
        return samples * self.gain, rate
