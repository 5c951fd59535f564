"""How far an error rate would move with another test set of the same kind: the bootstrap.

Source: Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation" (ICASSP 2004).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.scoring.word_errors import ErrorCounts

Unit = Literal["utterance", "speaker"]
Interval = tuple[float, float]

NUM_RESAMPLES = 1000
_QUANTILES = (0.025, 0.975)
# Five speakers have 126 different resamples, four have 35: fewer than a tail of 2.5 % can be told from.
MIN_SPEAKERS = 5
# Bounds the memory of a bootstrap, however many utterances there are.
_MAX_DRAWS_AT_A_TIME = 2**20


@dataclass(frozen=True)
class ResamplingUnits:
    """What a bootstrap draws: utterances, or speakers with all of theirs.

    numbers: `(num_utterances,)`, that of the unit of each utterance, from 0.
    """

    unit: Unit
    numbers: NDArray[np.int64]

    def sums(self, *columns: Sequence[int]) -> NDArray[np.float64]:
        """`(num_units, num_columns)`: sums of numbers of utterances over each unit."""
        return np.stack([np.bincount(self.numbers, weights=column) for column in columns], axis=1)


def resampling_units(speakers: Sequence[str | None]) -> ResamplingUnits:
    """Speakers where each utterance names one and there are `MIN_SPEAKERS` of them, else utterances.

    Errors of a speaker go together, so the interval of a bootstrap over utterances is too narrow. Source: Liu and Peng,
    "Statistical Testing on ASR Performance via Blockwise Bootstrap" (arXiv 1912.09508).
    """
    numbers = {speaker: number for number, speaker in enumerate(dict.fromkeys(speakers))}
    if None in numbers or len(numbers) < MIN_SPEAKERS:
        return ResamplingUnits("utterance", np.arange(len(speakers)))
    return ResamplingUnits("speaker", np.array([numbers[speaker] for speaker in speakers]))


def bootstrap_interval(counts: Sequence[ErrorCounts], units: ResamplingUnits, seed: int = 0) -> Interval | None:
    """The central 95 % of the error rate when units are drawn again with replacement.

    None where no reference has words, and of a single unit, which tells nothing of others.
    """
    totals = units.sums([count.errors for count in counts], [count.reference_length for count in counts])
    if len(totals) < 2 or not totals[:, 1].any():
        return None
    return central_interval(*resampled_sums(totals, seed).T)


def resampled_sums(totals: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """`(NUM_RESAMPLES, num_columns)`: sums over as many units as there are, drawn with replacement.

    totals: `(num_units, num_columns)`.
    """
    generator = np.random.default_rng(seed)
    num_units = len(totals)
    num_at_a_time = max(1, _MAX_DRAWS_AT_A_TIME // num_units)
    parts = []
    for first in range(0, NUM_RESAMPLES, num_at_a_time):
        num_resamples = min(num_at_a_time, NUM_RESAMPLES - first)
        drawn = generator.integers(0, num_units, (num_resamples, num_units))
        parts.append(totals[drawn].sum(axis=1))
    return np.concatenate(parts)


def central_interval(errors: NDArray[np.float64], lengths: NDArray[np.float64]) -> Interval:
    """The central 95 % of the rates of resamples; one without a word of reference has none."""
    has_words = lengths > 0
    low, high = np.quantile(errors[has_words] / lengths[has_words], _QUANTILES)
    return float(low), float(high)
