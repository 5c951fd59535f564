"""Paired comparisons find a real difference between runs, and call no chance difference significant."""

import math

import numpy as np
import pytest

from voxtral_dist.scoring.comparison import (
    MIN_MATCHED_PAIRS,
    PairedComparison,
    compare_runs,
    matched_pairs_p_value,
)
from voxtral_dist.scoring.intervals import resampling_units
from voxtral_dist.scoring.word_errors import ErrorCounts

REFERENCE_LENGTH = 10


def run_of(errors) -> list[ErrorCounts]:
    return [ErrorCounts(substitutions=int(one), reference_length=REFERENCE_LENGTH) for one in errors]


def compare(first, second, speakers=None) -> PairedComparison:
    return compare_runs(run_of(first), run_of(second), resampling_units(speakers or [None] * len(first)))


def errors_of(generator: np.random.Generator, rate: float, number: int = 400) -> np.ndarray:
    return generator.binomial(REFERENCE_LENGTH, rate, number)


def test_a_better_run_is_found():
    generator = np.random.default_rng(0)
    worse, better = errors_of(generator, 0.3), errors_of(generator, 0.2)
    found = compare(worse, better)
    low, high = found.difference_interval
    assert low < found.difference < high < 0
    assert found.difference == pytest.approx(-0.1, abs=0.02)
    assert found.probability_of_improvement > 0.999
    assert found.p_value < 1e-6


def test_the_other_direction_is_the_mirror():
    generator = np.random.default_rng(1)
    one, other = errors_of(generator, 0.25), errors_of(generator, 0.23)
    there, back = compare(one, other), compare(other, one)
    assert there.difference == -back.difference
    assert there.difference_interval == pytest.approx([-end for end in back.difference_interval[::-1]])
    assert there.probability_of_improvement == pytest.approx(1 - back.probability_of_improvement)
    assert there.p_value == back.p_value


def test_pairs_tell_more_than_two_intervals():
    """Utterances differ far more than runs do, so only pairs show that one run is better on each utterance."""
    generator = np.random.default_rng(0)
    first = generator.integers(1, 10, 300)
    second = first - (generator.random(300) < 0.2)
    found = compare(first, second)
    assert found.difference_interval[1] < 0
    assert found.p_value < 1e-6


def test_p_values_of_equally_good_runs_are_uniform():
    generator = np.random.default_rng(0)
    p_values = [
        matched_pairs_p_value(errors_of(generator, 0.3, 100) - errors_of(generator, 0.3, 100)) for _ in range(1000)
    ]
    for level in (0.05, 0.1, 0.25, 0.5, 0.75):
        assert np.mean(np.array(p_values) < level) == pytest.approx(level, abs=4 * math.sqrt(level / 1000))


def test_the_interval_of_equally_good_runs_holds_zero_nineteen_times_of_twenty():
    generator = np.random.default_rng(0)
    intervals = [
        compare(errors_of(generator, 0.3, 80), errors_of(generator, 0.3, 80)).difference_interval for _ in range(200)
    ]
    assert 178 <= sum(low <= 0 <= high for low, high in intervals) <= 198


def test_the_same_run_is_no_improvement():
    errors = errors_of(np.random.default_rng(0), 0.3)
    assert compare(errors, errors) == PairedComparison(400, "utterance", 0.0, (0.0, 0.0), 0.5, 1.0)


def test_the_statistic_is_that_of_matched_pairs():
    differences = [1] * 20 + [-1] * 12 + [0] * 8
    deviation = np.std(differences, ddof=1)
    statistic = np.mean(differences) / (deviation / math.sqrt(40))
    assert matched_pairs_p_value(differences) == pytest.approx(2 * (1 - (1 + math.erf(statistic / math.sqrt(2))) / 2))
    assert matched_pairs_p_value([1] * 40) == 0.0


def test_too_few_utterances_have_no_p_value():
    assert matched_pairs_p_value([1, -1] * (MIN_MATCHED_PAIRS // 2)) == 1.0
    assert matched_pairs_p_value([1] * (MIN_MATCHED_PAIRS - 1)) is None


def test_speakers_are_resampled_together():
    """One run is better for half of the speakers and worse for the others: which speakers are drawn decides."""
    generator = np.random.default_rng(0)
    speakers = [str(number) for number in range(10) for _ in range(40)]
    better = np.tile([1, -1], 5).repeat(40)
    first = generator.integers(2, 8, 400)
    alone, together = compare(first, first + better), compare(first, first + better, speakers)
    widths = [high - low for low, high in (alone.difference_interval, together.difference_interval)]
    assert together.resampled == "speaker"
    assert widths[1] > 4 * widths[0]


def test_no_utterances_and_a_single_one_have_no_interval():
    assert compare([], []) == PairedComparison(0, "utterance", None, None, None, None)
    assert compare([2], [1]) == PairedComparison(1, "utterance", -0.1, None, None, None)
