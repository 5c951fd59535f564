"""Cuts hold every budget and every example once; packing wastes little and joins only what may be joined."""

from itertools import pairwise

import numpy as np
import pytest

from voxtral_dist.data.plan.cutting import Budget, cut_micro_batches
from voxtral_dist.data.plan.packing import pack_into_windows

BUDGETS = [
    Budget(4, None, None),
    Budget(None, 6, None),
    Budget(None, None, 3000),
    Budget(5, 7, 3500),
]


def examples(num_examples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Windows and positions, longest first."""
    rng = np.random.default_rng(seed)
    windows = rng.integers(1, 4, num_examples)
    positions = windows * 375 + rng.integers(5, 120, num_examples)
    order = np.argsort(-positions, kind="stable")
    return windows[order], positions[order]


def holds(run: slice, windows: np.ndarray, positions: np.ndarray, budget: Budget) -> bool:
    """Whether one micro-batch keeps within the budget, from its definition."""
    count = run.stop - run.start
    return (
        (budget.max_examples is None or count <= budget.max_examples)
        and (budget.max_windows is None or windows[run].sum() <= budget.max_windows)
        and (budget.max_tokens is None or count * positions[run].max() <= budget.max_tokens)
    )


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("num_cuts", [None, 1, 20, 60, 200, 1000])
def test_cuts_hold_the_budget_and_each_example_once(budget, num_cuts):
    windows, positions = examples(200)
    cuts = cut_micro_batches(windows, positions, budget, num_cuts)
    assert [cuts[0].start, cuts[-1].stop] == [0, 200]
    assert all(one.stop == other.start for one, other in pairwise(cuts))
    assert all(holds(run, windows, positions, budget) for run in cuts)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("room", [1.0, 1.1, 1.5])
def test_as_many_cuts_as_wanted_where_they_suffice(budget, room):
    windows, positions = examples(300)
    fewest = len(cut_micro_batches(windows, positions, budget))
    wanted = round(fewest * room) + 3
    cuts = cut_micro_batches(windows, positions, budget, wanted)
    assert wanted <= len(cuts) <= wanted + max(1, fewest // 20)


def test_equal_examples_are_spread_evenly():
    windows, positions = np.ones(26, dtype=np.int64), np.full(26, 400)
    sizes = [run.stop - run.start for run in cut_micro_batches(windows, positions, Budget(3, None, None), 10)]
    assert len(sizes) == 10
    assert max(sizes) - min(sizes) <= 1


def test_an_example_above_the_budget_is_alone():
    windows, positions = np.array([9, 1, 1]), np.array([3400, 400, 400])
    assert cut_micro_batches(windows, positions, Budget(None, 4, None)) == [slice(0, 1), slice(1, 3)]


@pytest.mark.parametrize("seed", range(5))
def test_packing_holds_its_limits_and_each_utterance_once(seed):
    rng = np.random.default_rng(seed)
    duration_ms, tokens = rng.integers(300, 34_000, 400), rng.integers(1, 200, 400)
    languages = rng.integers(0, 3, 400).astype(np.uint16)
    groups = pack_into_windows(duration_ms, tokens, languages, np.arange(400), window_ms=30_000, max_tokens=448)
    assert sorted(position for group in groups for position in group) == list(range(400))
    for group in groups:
        assert len(group) == 1 or duration_ms[group].sum() <= 30_000
        assert len(group) == 1 or tokens[group].sum() <= 448
        assert len(set(languages[group].tolist())) == 1
        assert group == sorted(group)


def test_packing_is_within_the_bound_of_best_fit_decreasing():
    """At most 11/9 of the optimum and one window (Johnson 1973); the audio itself bounds the optimum from below."""
    duration_ms = np.random.default_rng(0).integers(1000, 15_000, 500)
    same = np.zeros(500, dtype=np.uint16)
    groups = pack_into_windows(duration_ms, np.ones(500, dtype=np.int64), same, np.arange(500), 30_000, 10**6)
    fewest = -(-int(duration_ms.sum()) // 30_000)
    assert len(groups) <= 11 / 9 * fewest + 1


def test_best_fit_leaves_the_least_room():
    duration_ms = np.array([20_000, 25_000, 5_000])
    ones, same = np.ones(3, dtype=np.int64), np.zeros(3, dtype=np.uint16)
    assert sorted(pack_into_windows(duration_ms, ones, same, np.arange(3), 30_000, 100)) == [[0], [1, 2]]


def test_an_utterance_is_never_packed_with_itself():
    ones, same = np.ones(40, dtype=np.int64), np.zeros(40, dtype=np.uint16)
    utterance_ids = np.arange(40) % 7
    groups = pack_into_windows(1000 * ones, ones, same, utterance_ids, 30_000, 448)
    assert all(len(set(utterance_ids[group].tolist())) == len(group) for group in groups)
    assert len(groups) == 6, "as many as draws of the most frequent one"
