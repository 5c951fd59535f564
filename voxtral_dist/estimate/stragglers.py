"""Time that ranks wait for the slowest one, because micro-batches differ in length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Sums of several micro-batches are drawn as often as this.
_NUM_SUMS = 4096


def expected_maximum(values: Sequence[float] | NDArray[np.float64], num_draws: int) -> float:
    """The mean of the largest of some independent draws from a sample, each value of which is as likely.

    Of n values x_1 <= ... <= x_n, the largest of k draws is x_i with the probability (i / n)^k - ((i - 1) / n)^k
    (David and Nagaraja, Order Statistics, 3rd edition, 2003, section 2.1).
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    below = np.arange(len(ordered) + 1) / len(ordered)
    return float((ordered * np.diff(below**num_draws)).sum())


def slowest_rank(costs: Sequence[float], num_slots: int, num_ranks: int, *, meets_in_micro_batches: bool) -> float:
    """The expected cost of a step on ranks that wait for each other, in means of a micro-batch.

    Each slot's micro-batch costs what one of `costs` does, drawn independently: the plan shuffles the micro-batches of
    a megabatch over its steps.

    Args:
        costs: of some micro-batches of the plan, in any unit; none where they are not known, and taken as equal.
        num_slots: micro-batches of a step, which ranks take in turn.
        num_ranks: of the run.
        meets_in_micro_batches: whether ranks wait for each other in each micro-batch (gradients or weights are
            exchanged there), or once in a step.
    """
    rounds = -(-num_slots // num_ranks)
    if not costs:
        return float(rounds)
    relative = np.asarray(costs, dtype=np.float64) / np.mean(costs)
    # Ranks with a micro-batch in the last round.
    full = num_slots - (rounds - 1) * num_ranks
    if meets_in_micro_batches:
        return (rounds - 1) * expected_maximum(relative, num_ranks) + expected_maximum(relative, full)
    sums = np.random.default_rng(0).choice(relative, (_NUM_SUMS, rounds)).sum(axis=1) if rounds > 1 else relative
    return expected_maximum(sums, full)
