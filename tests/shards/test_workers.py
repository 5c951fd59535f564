"""A map over processes is `map`: the same results in the same order, with few inputs taken ahead."""

import math
import os
from collections.abc import Iterator

import pytest

from voxtral_dist.errors import UserError
from voxtral_dist.shards.workers import ordered_map


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("num_inputs", [0, 1, 8, 9, 500])
def test_the_results_are_those_of_map(num_workers, num_inputs):
    assert list(ordered_map(math.sqrt, range(num_inputs), num_workers)) == list(map(math.sqrt, range(num_inputs)))


def test_few_inputs_are_taken_before_their_results_are():
    taken = 0

    def inputs() -> Iterator[int]:
        nonlocal taken
        for number in range(100_000):
            taken += 1
            yield number

    results = ordered_map(math.sqrt, inputs(), num_workers=2, batch_size=4)
    for number in range(1000):
        assert next(results) == math.sqrt(number)
        assert taken <= number + 2 * 3 * 4 + 4
    results.close()


def test_an_error_of_the_function_is_an_error_of_the_iteration():
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
        list(ordered_map(math.sqrt, [*range(50), -1, *range(50)], num_workers=2))


def test_an_error_of_the_inputs_ends_the_workers():
    def inputs() -> Iterator[int]:
        yield from range(100)
        raise UserError("the source breaks off")

    with pytest.raises(UserError, match="the source breaks off"):
        list(ordered_map(math.sqrt, inputs(), num_workers=2))


def test_a_worker_that_is_killed_is_one_sentence():
    with pytest.raises(UserError, match="A worker process was killed"):
        list(ordered_map(os._exit, [9] * 50, num_workers=2))
