"""Whether one run is better than another on the same utterances, or whether it is chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from voxtral_dist.scoring.intervals import Interval, ResamplingUnits, Unit, central_interval, resampled_sums
from voxtral_dist.scoring.word_errors import ErrorCounts

# Below it a mean of differences is not normal enough.
MIN_MATCHED_PAIRS = 30


@dataclass(frozen=True)
class PairedComparison:
    """A second run against a first one on the same utterances.

    wer_difference: of the second minus the first, so a negative one is an improvement; wer_difference_interval: its
    central 95 % under a bootstrap of `resampled` units, drawn for both runs alike. probability_of_improvement: of
    resamples, the share in which the second run has fewer errors; a tie counts half. p_value: of the matched-pairs
    test. What cannot be told is None: all without words of reference, what a bootstrap tells of a single unit, and the
    p-value of fewer than `MIN_MATCHED_PAIRS` utterances.
    """

    num_utterances: int
    resampled: Unit
    wer_difference: float | None
    wer_difference_interval: Interval | None
    probability_of_improvement: float | None
    p_value: float | None


def compare_runs(
    first: Sequence[ErrorCounts], second: Sequence[ErrorCounts], units: ResamplingUnits, seed: int = 0
) -> PairedComparison:
    """How the second run differs from the first; counts of the same utterances in the same order.

    Source: Bisani and Ney (ICASSP 2004), for the interval and the probability of improvement.
    """
    more_errors = [other.errors - one.errors for one, other in zip(first, second, strict=True)]
    lengths = [count.reference_length for count in first]
    p_value = matched_pairs_p_value(more_errors)
    difference = sum(more_errors) / sum(lengths) if sum(lengths) else None
    totals = units.sums(more_errors, lengths)
    if difference is None or len(totals) < 2:
        return PairedComparison(len(first), units.unit, difference, None, None, p_value)
    resampled_errors, resampled_lengths = resampled_sums(totals, seed).T
    is_better, is_tie = resampled_errors < 0, resampled_errors == 0
    return PairedComparison(
        num_utterances=len(first),
        resampled=units.unit,
        wer_difference=difference,
        wer_difference_interval=central_interval(resampled_errors, resampled_lengths),
        probability_of_improvement=float(np.mean(is_better + is_tie / 2)),
        p_value=p_value,
    )


def matched_pairs_p_value(differences: Sequence[int]) -> float | None:
    """The chance of a mean difference of errors at least this far from 0 if both runs were equally good.

    Two-sided, with utterances as segments and the normal approximation: `W = mean / (deviation / sqrt(n))`. Source:
    Gillick and Cox, "Some statistical issues in the comparison of speech recognition algorithms" (ICASSP 1989), known
    as MAPSSWE. None for fewer than `MIN_MATCHED_PAIRS` utterances.
    """
    if len(differences) < MIN_MATCHED_PAIRS:
        return None
    mean, deviation = float(np.mean(differences)), float(np.std(differences, ddof=1))
    if deviation == 0:
        return 0.0 if mean else 1.0
    statistic = mean / (deviation / math.sqrt(len(differences)))
    return math.erfc(abs(statistic) / math.sqrt(2))
