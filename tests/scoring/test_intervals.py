"""Intervals cover the true rate as often as they promise, and are wider where errors are correlated."""

import numpy as np
import pytest

from voxtral_dist.scoring.intervals import MIN_SPEAKERS, bootstrap_interval, resampling_units
from voxtral_dist.scoring.word_errors import ErrorCounts

REFERENCE_LENGTH = 20


def counts_of(errors: np.ndarray) -> list[ErrorCounts]:
    return [ErrorCounts(substitutions=int(one), reference_length=REFERENCE_LENGTH) for one in errors]


def interval_of(counts: list[ErrorCounts], speakers: list[str | None] | None = None, seed: int = 0):
    return bootstrap_interval(counts, resampling_units(speakers or [None] * len(counts)), seed)


def width(interval: tuple[float, float]) -> float:
    return interval[1] - interval[0]


@pytest.mark.parametrize("seed", range(3))
def test_an_interval_holds_the_rate_and_is_the_same_every_time(seed):
    counts = counts_of(np.random.default_rng(seed).binomial(REFERENCE_LENGTH, 0.2, 200))
    low, high = interval_of(counts)
    assert low < sum(counts, ErrorCounts()).rate < high
    assert (low, high) == interval_of(counts)
    assert (low, high) != interval_of(counts, seed=1)


def test_the_interval_of_a_mean_is_the_normal_one():
    """With references of equal length the rate is a mean, whose interval is 1.96 standard errors wide on each side."""
    errors = np.random.default_rng(0).binomial(REFERENCE_LENGTH, 0.2, 2000)
    rates = errors / REFERENCE_LENGTH
    deviation = rates.std() / np.sqrt(len(rates))
    low, high = interval_of(counts_of(errors))
    assert low == pytest.approx(rates.mean() - 1.96 * deviation, abs=0.25 * deviation)
    assert high == pytest.approx(rates.mean() + 1.96 * deviation, abs=0.25 * deviation)


def test_nineteen_of_twenty_intervals_hold_the_true_rate():
    generator = np.random.default_rng(0)
    intervals = [interval_of(counts_of(generator.binomial(REFERENCE_LENGTH, 0.2, 80))) for _ in range(200)]
    covered = sum(low <= 0.2 <= high for low, high in intervals)
    assert 178 <= covered <= 198


def test_more_utterances_give_a_narrower_interval():
    few, many = (
        interval_of(counts_of(np.random.default_rng(0).binomial(REFERENCE_LENGTH, 0.2, number))) for number in (30, 600)
    )
    assert width(many) < width(few) / 2


def test_the_interval_of_equal_utterances_is_their_rate():
    assert interval_of([ErrorCounts(1, 0, 0, 4)] * 10) == (0.25, 0.25)


def test_resamples_without_a_word_of_reference_have_no_rate():
    counts = [ErrorCounts(1, 0, 0, 4), ErrorCounts(0, 0, 3, 0)]
    low, high = interval_of(counts)
    assert low == 0.25
    assert np.isfinite(high)


@pytest.mark.parametrize("counts", [[], [ErrorCounts(0, 0, 3, 0)] * 3, [ErrorCounts(1, 0, 0, 4)]])
def test_no_utterances_and_a_single_one_have_no_interval(counts):
    assert interval_of(counts) is None


def clustered(num_speakers: int, num_each: int) -> tuple[list[ErrorCounts], list[str]]:
    """Errors that differ between speakers, but hardly between utterances of one speaker."""
    generator = np.random.default_rng(0)
    rates = generator.uniform(0, 0.6, num_speakers)
    errors = generator.binomial(REFERENCE_LENGTH, rates.repeat(num_each))
    return counts_of(errors), [f"speaker {number}" for number in np.arange(num_speakers).repeat(num_each)]


def test_speakers_give_a_wider_interval_where_their_errors_are_correlated():
    counts, speakers = clustered(num_speakers=20, num_each=30)
    assert resampling_units(speakers).unit == "speaker"
    assert width(interval_of(counts, speakers)) > 2 * width(interval_of(counts))


def test_speakers_with_an_utterance_each_are_utterances():
    counts = counts_of(np.random.default_rng(0).binomial(REFERENCE_LENGTH, 0.2, 50))
    assert interval_of(counts, [str(number) for number in range(50)]) == interval_of(counts)


@pytest.mark.parametrize(
    ("speakers", "unit"),
    [
        ([str(number) for number in range(MIN_SPEAKERS)], "speaker"),
        ([str(number) for number in range(MIN_SPEAKERS - 1)] * 2, "utterance"),
        ([*(str(number) for number in range(MIN_SPEAKERS)), None], "utterance"),
        ([], "utterance"),
    ],
)
def test_speakers_are_resampled_where_all_are_known_and_there_are_enough(speakers, unit):
    assert resampling_units(speakers).unit == unit


def test_a_large_set_is_resampled_in_parts(monkeypatch):
    counts = counts_of(np.random.default_rng(0).binomial(REFERENCE_LENGTH, 0.2, 100))
    at_once = interval_of(counts)
    monkeypatch.setattr("voxtral_dist.scoring.intervals._MAX_DRAWS_AT_A_TIME", 700)
    assert interval_of(counts) == at_once
