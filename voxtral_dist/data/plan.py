"""The order of training as a pure function: which samples make up which slot of which step.

    samples of a pass   permuted block by block, without a table of N (a Feistel network with cycle walking)
    sort window         the samples of some steps, sorted by what the model pays for them
    micro-batch         a run of neighbours of that order
    slot                the place of a micro-batch in its step: shuffled inside the window

`TrainPlan.slot(step, slot)` depends on (seed, index, configuration) alone: not on ranks, nodes, workers, or on what was
asked before. So every rank computes its own part, the global batch is the same for any number of GPUs, and resuming
costs one sort window wherever the run stood.

The permutation: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002), sections 3 and 5. The round
function is the finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.errors import UserError

Ids = NDArray[np.int64]
_U64 = np.uint64
_NUM_ROUNDS = 4


@dataclass(frozen=True)
class PlanShape:
    """The numbers that cut a pass into steps: see `TrainDataConfig` for their meaning."""

    slots_per_step: int
    examples_per_slot: int
    sort_window_steps: int
    shuffle_block_size: int

    @property
    def samples_per_step(self) -> int:
        """Of a full step, over all slots and so over all ranks."""
        return self.slots_per_step * self.examples_per_slot


@dataclass(frozen=True)
class SlotSamples:
    """The samples of one slot of one step, and the number of the pass over the data that they are drawn in."""

    sample_ids: Ids
    pass_index: int


class TrainPlan:
    """Every sample once per pass, in micro-batches of similar cost."""

    def __init__(self, cost: NDArray[np.int64], sample_ids: Ids | None, shape: PlanShape, key: Sequence[int]) -> None:
        """A plan over samples.

        Args:
            cost: what one forward pass pays for each sample of the index, `(N,)`, in positions of the language model.
            sample_ids: the samples to draw, in the order of the index; None draws all.
            shape: how a pass is cut.
            key: small integers that the order depends on, such as the seed.
        """
        self._cost = cost
        self._sample_ids = sample_ids
        self._shape = shape
        self._key = tuple(key)
        self.num_samples = len(cost) if sample_ids is None else len(sample_ids)
        if self.num_samples == 0:
            raise ValueError("a plan needs at least one sample")
        self._sort_window = lru_cache(maxsize=2)(self._build_sort_window)

    @property
    def steps_per_pass(self) -> int:
        """The last sort window of a pass spreads what is left evenly over its steps."""
        return -(-self.num_samples // self._shape.samples_per_step)

    def slot(self, step: int, slot: int) -> SlotSamples:
        """The samples of a slot; fewer than `examples_per_slot`, or none, only near the end of a pass."""
        pass_index, step_of_pass = divmod(step, self.steps_per_pass)
        window, step_of_window = divmod(step_of_pass, self._shape.sort_window_steps)
        micro_batches = self._sort_window(pass_index, window)
        return SlotSamples(micro_batches[step_of_window * self._shape.slots_per_step + slot], pass_index)

    def _build_sort_window(self, pass_index: int, window: int) -> list[Ids]:
        """The micro-batches of a window in the order of (step, slot)."""
        shape = self._shape
        first_step = window * shape.sort_window_steps
        num_steps = min(shape.sort_window_steps, self.steps_per_pass - first_step)
        first = first_step * shape.samples_per_step
        positions = np.arange(first, min(first + num_steps * shape.samples_per_step, self.num_samples))
        places = permute_blocks(positions, self.num_samples, shape.shuffle_block_size, (*self._key, pass_index))
        sample_ids = places if self._sample_ids is None else self._sample_ids[places]
        # Equal costs keep the order of the permutation, so that micro-batches of equal cost still mix.
        by_cost = sample_ids[np.argsort(self._cost[sample_ids], kind="stable")]
        micro_batches = np.array_split(by_cost, num_steps * shape.slots_per_step)
        order = np.argsort(_hash(np.arange(len(micro_batches)), (*self._key, pass_index, window, 1)), kind="stable")
        return [micro_batches[place] for place in order]


def rank_slots(slots_per_step: int, rank: int, world_size: int) -> range:
    """The slots of a step that a rank runs.

    Raises:
        UserError: there are more ranks than slots, so that some would have nothing to do.
    """
    if world_size > slots_per_step:
        raise UserError(
            f"`train_data.slots_per_step` is {slots_per_step}, but {world_size} ranks were started and each needs at "
            f"least one slot: start at most {slots_per_step} ranks, or set it to {world_size} or more (this changes "
            "the global batch)."
        )
    return range(rank, slots_per_step, world_size)


def permute_blocks(positions: Ids, num_samples: int, block_size: int, key: Sequence[int]) -> Ids:
    """Where each position of a pass is found in the index, when blocks of neighbours are shuffled.

    A bijection of 0..num_samples-1 for every key. The last block may be short: wherever it lands, all later positions
    move up by what it lacks.
    """
    num_blocks = -(-num_samples // block_size)
    lacking = num_blocks * block_size - num_samples
    if lacking:
        end_of_short = _place_of(num_blocks - 1, num_blocks, key) * block_size + block_size - lacking
        positions = np.where(positions >= end_of_short, positions + lacking, positions)
    blocks, inside = np.divmod(positions, block_size)
    places: Ids = permute(blocks, num_blocks, key) * block_size + inside
    return places


def permute(values: Ids, size: int, key: Sequence[int]) -> Ids:
    """A keyed bijection of 0..size-1, computed for `values` alone."""
    return _walk(values, size, _round_keys(key))


def _place_of(value: int, size: int, key: Sequence[int]) -> int:
    """The inverse of `permute`: a Feistel network runs backwards with reversed round keys and swapped halves."""
    half_bits = _half_bits(size)
    keys = _round_keys(key)[::-1]
    current = np.array([value])
    while True:
        current = _swap(_encrypt(_swap(current, half_bits), half_bits, keys), half_bits)
        if current[0] < size:
            return int(current[0])


def _walk(values: Ids, size: int, keys: NDArray[np.uint64]) -> Ids:
    half_bits = _half_bits(size)
    current = _encrypt(values, half_bits, keys)
    # The network permutes a power of four below 4 * size: values that leave the range are encrypted again.
    while (outside := current >= size).any():
        current[outside] = _encrypt(current[outside], half_bits, keys)
    return current


def _half_bits(size: int) -> int:
    return max(1, -(-(size - 1).bit_length() // 2))


def _round_keys(key: Sequence[int]) -> NDArray[np.uint64]:
    return _hash(np.arange(_NUM_ROUNDS), (*key, 0))


def _encrypt(values: Ids, half_bits: int, keys: NDArray[np.uint64]) -> Ids:
    mask = _U64((1 << half_bits) - 1)
    shift = _U64(half_bits)
    left, right = values.astype(_U64) >> shift, values.astype(_U64) & mask
    for round_key in keys:
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return ((left << shift) | right).astype(np.int64)


def _swap(values: Ids, half_bits: int) -> Ids:
    mask = (1 << half_bits) - 1
    return ((values & mask) << half_bits) | (values >> half_bits)


def _hash(values: Ids, key: Sequence[int]) -> NDArray[np.uint64]:
    state = np.zeros(1, dtype=_U64)
    for part in key:
        state = _mix(state ^ _U64(part))
    return _mix(values.astype(_U64) ^ state)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        mixed = values + _U64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> _U64(27))) * _U64(0x94D049BB133111EB)
    return mixed ^ (mixed >> _U64(31))
