"""Paired comparison of two runs on the same utterances, and its significance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from voxtral_dist.config import ErrorRate
from voxtral_dist.errors import UserError
from voxtral_dist.output.counting import counted
from voxtral_dist.scoring.grouping import Grouping
from voxtral_dist.scoring.intervals import (
    Interval,
    ResamplingUnits,
    Unit,
    central_interval,
    resampled_sums,
    resampling_units,
)
from voxtral_dist.scoring.utterances import ScoredUtterance
from voxtral_dist.scoring.word_errors import ErrorCounts

# With fewer utterances the mean difference is not close enough to normal.
MIN_MATCHED_PAIRS = 30

Pair = tuple[ScoredUtterance, ScoredUtterance]


@dataclass(frozen=True)
class PairedComparison:
    """A second run compared with a first one on the same utterances.

    Attributes:
        metric: the error rate that is compared.
        difference: rate of the second run minus that of the first; negative is an improvement. None without a
            reference.
        difference_interval: its central 95 % under a bootstrap that draws the same `resampled` units for both runs;
            None for a single unit, or without a reference.
        probability_of_improvement: fraction of resamples in which the second run has fewer errors; a tie counts half.
            None for a single unit, or without a reference.
        p_value: of the matched-pairs test; None for fewer than `MIN_MATCHED_PAIRS` utterances.
    """

    num_utterances: int
    resampled: Unit
    difference: float | None
    difference_interval: Interval | None
    probability_of_improvement: float | None
    p_value: float | None
    metric: ErrorRate = "wer"


def pair_utterances(
    first: Sequence[ScoredUtterance], second: Sequence[ScoredUtterance], paths: tuple[Path, Path]
) -> list[Pair]:
    """Pair utterances by key, or by position where keys are missing or not unique.

    Args:
        first: the utterances of one run; pairs are in their order.
        second: the utterances of the other run.
        paths: their files, for error messages.

    Raises:
        UserError: the runs do not have the same utterances with the same references.
    """
    by_key = _by_key(second)
    if _by_key(first) is None or by_key is None:
        others = second
        if len(others) != len(first):
            raise _different(paths, f"{len(first)} against {counted(len(others), 'utterance')} without keys")
    else:
        alone = {one.decoded.key for one in first} ^ by_key.keys()
        if alone:
            raise _different(paths, f"{counted(len(alone), 'key')} in only one of them, such as {min(alone)!r}")
        others = tuple(by_key[one.decoded.key] for one in first)
    pairs = list(zip(first, others, strict=True))
    for number, (one, other) in enumerate(pairs, 1):
        if one.decoded.reference != other.decoded.reference:
            name = repr(one.decoded.key) if one.decoded.key else f"utterance {number}"
            raise _different(paths, f"the references of {name} differ")
    return pairs


def compare_pairs(pairs: Sequence[Pair], grouping: Grouping, metric: ErrorRate = "wer") -> PairedComparison:
    """Compare the second run with the first, by words or by characters.

    A speaker that only one of them names is used for both.
    """
    speakers = [grouping.speaker(one.decoded) or grouping.speaker(other.decoded) for one, other in pairs]
    first, second = ([pair[place].counts(metric) for pair in pairs] for place in (0, 1))
    return replace(compare_runs(first, second, resampling_units(speakers)), metric=metric)


def compare_runs(
    first: Sequence[ErrorCounts], second: Sequence[ErrorCounts], units: ResamplingUnits, seed: int = 0
) -> PairedComparison:
    """Compare the errors of two runs, all of words or all of characters, on the same utterances in the same order.

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
        difference=difference,
        difference_interval=central_interval(resampled_errors, resampled_lengths),
        probability_of_improvement=float(np.mean(is_better + is_tie / 2)),
        p_value=p_value,
    )


def matched_pairs_p_value(differences: Sequence[int]) -> float | None:
    """Probability of a mean error difference at least this far from 0 between equally good runs.

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


def _by_key(utterances: Sequence[ScoredUtterance]) -> dict[str, ScoredUtterance] | None:
    """Utterances by key; None where a key is missing or not unique."""
    by_key = {one.decoded.key: one for one in utterances}
    return by_key if "" not in by_key and len(by_key) == len(utterances) else None


def _different(paths: tuple[Path, Path], reason: str) -> UserError:
    return UserError(
        f"{paths[0]} and {paths[1]} do not hold the same utterances ({reason}): compare two runs on the same test set."
    )
