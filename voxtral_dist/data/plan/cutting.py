"""From the samples of a sort window to its micro-batches: short ones packed together, then cuts within the budgets."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.data.stored.shard_set import Ids


@dataclass(frozen=True)
class Budget:
    """What a micro-batch may hold at most; None sets no limit.

    max_tokens: input positions of the language model after padding, that is examples times the longest of them.
    """

    max_examples: int | None
    max_windows: int | None
    max_tokens: int | None


def cut_micro_batches(windows: Ids, positions: Ids, budget: Budget, num_cuts: int | None = None) -> list[slice]:
    """Micro-batches as runs of examples.

    Args:
        windows: of each example, `(n,)`.
        positions: input positions of the language model of each example, `(n,)`, longest first.
        budget: what a micro-batch may hold. An example that is larger by itself gets a micro-batch of its own.
        num_cuts: how many micro-batches are wanted, equally full; more come out only where the budget demands it, fewer
            only where there are fewer examples. None: as few as possible.
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


def _load(windows: Ids, positions: Ids, budget: Budget) -> NDArray[np.float64]:
    """The share of a micro-batch that each example takes by the budget that it strains most."""
    shares = [
        np.asarray(values) / limit
        for values, limit in (
            (np.ones(len(windows)), budget.max_examples),
            (windows, budget.max_windows),
            (positions, budget.max_tokens),
        )
        if limit is not None
    ]
    load: NDArray[np.float64] = np.maximum.reduce(shares)
    return load


def _largest_end(start: int, ends_of_windows: Sequence[int], positions: Ids, budget: Budget) -> int:
    """Where a micro-batch that begins at `start` must end."""
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
    """Where a micro-batch ends that takes its even part of what is left."""
    before = load[start - 1] if start else 0.0
    target = before + (load[-1] - before) / num_left
    end = bisect.bisect_left(load, target)
    # The example on the edge goes where it brings the cut nearer to its target.
    nearer_with_it = end < len(load) and load[end] - target <= target - (load[end - 1] if end else 0.0)
    return max(start + 1, end + int(nearer_with_it))
