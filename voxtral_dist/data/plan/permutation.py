"""Keyed permutations of 0..n-1, computed value by value without a table of size n.

A Feistel network with cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002), sections
3 and 5. The round function is the finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
_U64 = np.uint64
_NUM_ROUNDS = 4
# Networks of few bits are far from random: up to this size, a table sorted by hash is the permutation.
_LARGEST_TABLE = 4096


def permute_blocks(positions: Integers, num_utterances: int, block_size: int, key: Sequence[int]) -> Integers:
    """Shuffle blocks of neighbours: the place in the index of each position of an epoch, `(n,)`.

    The result is a bijection of 0..num_utterances-1 for every key. The last block may be short: wherever it lands, the
    positions after it move up by the number of utterances that it lacks.

    Args:
        positions: positions in the epoch, `(n,)`.
        num_utterances: number of utterances in the epoch.
        block_size: number of neighbours that stay together.
        key: integers that seed the permutation.
    """
    num_blocks = -(-num_utterances // block_size)
    lacking = num_blocks * block_size - num_utterances
    if lacking:
        end_of_short = _place_of(num_blocks - 1, num_blocks, key) * block_size + block_size - lacking
        positions = np.where(positions >= end_of_short, positions + lacking, positions)
    blocks, inside = np.divmod(positions, block_size)
    places: Integers = permute(blocks, num_blocks, key) * block_size + inside
    return places


def permute(values: Integers, size: int, key: Sequence[int]) -> Integers:
    """Apply a keyed bijection of 0..size-1 to `values`, `(n,)`."""
    if size <= _LARGEST_TABLE:
        return _table(size, key)[values]
    return _walk(values, size, _round_keys(key))


def _place_of(value: int, size: int, key: Sequence[int]) -> int:
    """Invert `permute`: a Feistel network runs backwards with reversed round keys and swapped halves."""
    if size <= _LARGEST_TABLE:
        return int(np.flatnonzero(_table(size, key) == value)[0])
    half_bits = _half_bits(size)
    keys = _round_keys(key)[::-1]
    current = np.array([value])
    while True:
        current = _swap(_encrypt(_swap(current, half_bits), half_bits, keys), half_bits)
        if current[0] < size:
            return int(current[0])


def _table(size: int, key: Sequence[int]) -> Integers:
    return np.argsort(hash_values(np.arange(size), (*key, 3)), kind="stable")


def _walk(values: Integers, size: int, keys: NDArray[np.uint64]) -> Integers:
    half_bits = _half_bits(size)
    current = _encrypt(values, half_bits, keys)
    # Cycle walking: the network permutes a power of four below 4 * size, and results outside the range are encrypted
    # again.
    while (outside := current >= size).any():
        current[outside] = _encrypt(current[outside], half_bits, keys)
    return current


def _half_bits(size: int) -> int:
    return max(1, -(-(size - 1).bit_length() // 2))


def _round_keys(key: Sequence[int]) -> NDArray[np.uint64]:
    return hash_values(np.arange(_NUM_ROUNDS), (*key, 0))


def _encrypt(values: Integers, half_bits: int, keys: NDArray[np.uint64]) -> Integers:
    mask = _U64((1 << half_bits) - 1)
    shift = _U64(half_bits)
    left, right = values.astype(_U64) >> shift, values.astype(_U64) & mask
    for round_key in keys:
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return ((left << shift) | right).astype(np.int64)


def _swap(values: Integers, half_bits: int) -> Integers:
    mask = (1 << half_bits) - 1
    return ((values & mask) << half_bits) | (values >> half_bits)


def hash_values(values: Integers, key: Sequence[int]) -> NDArray[np.uint64]:
    """Pseudorandom numbers, one for each value, `(n,)`; equal for equal (value, key)."""
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
