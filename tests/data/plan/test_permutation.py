"""Keyed permutations of any size, computed for single values."""

import math
from collections import Counter

import numpy as np
import pytest

from voxtral_dist.data.plan.permutation import permute, permute_blocks


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 1000, 4096, 4097, 70_000])
def test_permute_is_a_bijection(size):
    for key in ((0,), (1, 2), (5, 0, 9)):
        assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_permute_is_computed_for_single_values_alike():
    whole = permute(np.arange(1000), 1000, (4,))
    some = [0, 1, 500, 999]
    assert [int(permute(np.array([value]), 1000, (4,))[0]) for value in some] == whole[some].tolist()


@pytest.mark.parametrize("size", [3, 4, 5])
def test_all_orders_of_a_few_are_equally_frequent(size):
    orders = Counter(tuple(permute(np.arange(size), size, (key,)).tolist()) for key in range(6000))
    expected = 6000 / math.factorial(size)
    assert len(orders) == math.factorial(size)
    # The sum of squared deviations is that of chance: its mean is the degrees of freedom, and this five deviations off.
    freedom = math.factorial(size) - 1
    chi_squared = sum((count - expected) ** 2 / expected for count in orders.values())
    assert chi_squared < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("num_utterances", [1, 7, 64, 100])
@pytest.mark.parametrize("block_size", [1, 3, 8, 200])
def test_blocks_of_neighbours_stay_together(num_utterances, block_size):
    places = permute_blocks(np.arange(num_utterances), num_utterances, block_size, (1,)).tolist()
    assert sorted(places) == list(range(num_utterances))
    first_of_blocks = [place for place in places if place % block_size == 0]
    in_blocks = [range(first, min(first + block_size, num_utterances)) for first in first_of_blocks]
    assert places == [place for block in in_blocks for place in block]
