"""Cutting sorted examples into micro-batches that keep within a budget."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Budget:
    """The limits of a micro-batch; None sets no limit.

    max_examples: number of examples.
    max_windows: number of encoder windows of all examples.
    max_tokens: input positions of the language model, padding included: examples times the longest of them.
    """

    max_examples: int | None
    max_windows: int | None
    max_tokens: int | None


def cut_micro_batches(
    windows: NDArray[np.int64], positions: NDArray[np.int64], budget: Budget, num_cuts: int | None = None
) -> list[slice]:
    """Cut a sequence of examples into micro-batches, which are runs of it.

    Args:
        windows: encoder windows of each example, `(n,)`.
        positions: input positions of each example in the language model, `(n,)`, longest first.
        budget: limits of a micro-batch. An example above them gets a micro-batch of its own.
        num_cuts: number of micro-batches wanted, equally full. The result has more only if the budget demands it, and
            fewer only if there are fewer examples. None: as few as possible.
    """
    ends_of_windows = np.cumsum(windows).tolist()
    load = np.cumsum(_load(windows, positions, budget)).tolist()
    cuts: list[slice] = []
    start = 0
    while start < len(load):
        end = _largest_end(start, ends_of_windows, positions, budget)
        if num_cuts is not None and len(cuts) < num_cuts:
            end = min(end, _even_end(start, load, num_cuts - len(cuts)))
        cuts.append(slice(start, end))
        start = end
    return cuts


def _load(windows: NDArray[np.int64], positions: NDArray[np.int64], budget: Budget) -> NDArray[np.float64]:
    """The fraction of a micro-batch that each example takes, by the tightest limit, `(n,)`."""
    fractions = [
        np.asarray(values) / limit
        for values, limit in (
            (np.ones(len(windows)), budget.max_examples),
            (windows, budget.max_windows),
            (positions, budget.max_tokens),
        )
        if limit is not None
    ]
    load: NDArray[np.float64] = np.maximum.reduce(fractions)
    return load


def _largest_end(start: int, ends_of_windows: Sequence[int], positions: NDArray[np.int64], budget: Budget) -> int:
    """The last end that the budget allows for a micro-batch that begins at `start`."""
    ends = [len(positions)]
    if budget.max_examples is not None:
        ends.append(start + budget.max_examples)
    if budget.max_tokens is not None:
        ends.append(start + budget.max_tokens // int(positions[start]))
    if budget.max_windows is not None:
        before = ends_of_windows[start - 1] if start else 0
        ends.append(bisect.bisect_right(ends_of_windows, before + budget.max_windows))
    return max(start + 1, min(ends))


def _even_end(start: int, load: Sequence[float], num_left: int) -> int:
    """The end that gives the micro-batch at `start` an equal part of the remaining load."""
    before = load[start - 1] if start else 0.0
    target = before + (load[-1] - before) / num_left
    end = bisect.bisect_left(load, target)
    # The example on the edge is included if that brings the cut closer to its target.
    nearer_with_it = end < len(load) and load[end] - target <= target - (load[end - 1] if end else 0.0)
    return max(start + 1, end + int(nearer_with_it))
