"""Bootstrap confidence intervals of error rates.

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
# Five speakers have 126 different resamples, four have 35: too few to estimate a tail of 2.5 %.
MIN_SPEAKERS = 5
# Bounds the memory of a bootstrap for any number of utterances.
_MAX_DRAWS_AT_A_TIME = 2**20


@dataclass(frozen=True)
class ResamplingUnits:
    """What a bootstrap draws: single utterances, or speakers with all of their utterances.

    numbers: `(num_utterances,)`, the number of each utterance's unit, from 0.
    """

    unit: Unit
    numbers: NDArray[np.int64]

    def sums(self, *columns: Sequence[int]) -> NDArray[np.float64]:
        """Sum columns, which have one value per utterance, over each unit: `(num_units, num_columns)`."""
        return np.stack([np.bincount(self.numbers, weights=column) for column in columns], axis=1)


def resampling_units(speakers: Sequence[str | None]) -> ResamplingUnits:
    """Choose speakers if every utterance has one and there are at least `MIN_SPEAKERS`, else utterances.

    Errors of one speaker are correlated, so that a bootstrap over utterances gives too narrow an interval. Source: Liu
    and Peng, "Statistical Testing on ASR Performance via Blockwise Bootstrap" (arXiv 1912.09508).
    """
    numbers = {speaker: number for number, speaker in enumerate(dict.fromkeys(speakers))}
    if None in numbers or len(numbers) < MIN_SPEAKERS:
        return ResamplingUnits("utterance", np.arange(len(speakers)))
    return ResamplingUnits("speaker", np.array([numbers[speaker] for speaker in speakers]))


def bootstrap_interval(counts: Sequence[ErrorCounts], units: ResamplingUnits, seed: int = 0) -> Interval | None:
    """The central 95 % of the error rate when units are resampled with replacement.

    None where no reference has words, and for a single unit, whose resamples are all equal.
    """
    totals = units.sums([count.errors for count in counts], [count.reference_length for count in counts])
    if len(totals) < 2 or not totals[:, 1].any():
        return None
    return central_interval(*resampled_sums(totals, seed).T)


def resampled_sums(totals: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Sums of `NUM_RESAMPLES` resamples, each of `num_units` units drawn with replacement.

    Args:
        totals: `(num_units, num_columns)`.
        seed: of the draws.

    Returns:
        `(NUM_RESAMPLES, num_columns)`.
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
    """The central 95 % of the rates of resamples. Resamples without reference words have no rate and are ignored."""
    has_words = lengths > 0
    low, high = np.quantile(errors[has_words] / lengths[has_words], _QUANTILES)
    return float(low), float(high)
