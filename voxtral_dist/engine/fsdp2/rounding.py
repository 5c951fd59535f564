"""Stochastic rounding to bfloat16 whose random bits depend on the place of a value, not on what was drawn before.

Rounding to the nearest bfloat16 loses every change below half a unit in the last place, 0.2 to 0.4 % of a weight, which
is more than most updates. Rounded up with the probability of the part that is cut off, the value is right in
expectation (Gupta et al., arXiv 1502.02551).
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

# Positions are counted in 32 bits.
MAX_VALUES = 2**32
# Multipliers of a 32-bit mixing function with little bias (Wellons, "Prospecting for Hash Functions": lowbias32).
_MULTIPLIERS = (0x21F0AAAD, 0x735A2D97)
_CUT_BITS = 16


def random_keys(seed: int, step: int, names: Sequence[str]) -> list[tuple[int, int]]:
    """Two signed 32-bit numbers per name: its key of random bits in one step."""
    digests = (blake2b(f"{seed}/{step}/{name}".encode(), digest_size=8).digest() for name in names)
    return [(int.from_bytes(one[:4], signed=True), int.from_bytes(one[4:], signed=True)) for one in digests]


def random_bits(place: Tensor, count: int) -> Tensor:
    """Random int32 values `(count,)`, a function of a key and of the positions of the values.

    Args:
        place: int32 `(3,)`, on the device of the result: a key of `random_keys`, and the first position as `wrapped`.
        count: number of values.
    """
    positions = torch.arange(count, dtype=torch.int32, device=place.device) + place[2]
    return _mixed(_mixed(positions ^ place[0]) + place[1])


def wrapped(position: int) -> int:
    """A position below 2^32 as the signed integer of the same 32 bits."""
    return (position + 2**31) % 2**32 - 2**31


def to_bfloat16(values: Tensor, bits: Tensor) -> Tensor:
    """Round finite float32 values to one of the two nearest bfloat16 values each, by the low 16 random bits."""
    mask = (1 << _CUT_BITS) - 1
    raised = values.view(torch.int32) + (bits & mask)
    return (raised & ~mask).view(torch.float32).to(torch.bfloat16)


def add_rounded(total: Tensor, values: Tensor, place: Tensor) -> None:
    """Add values to a bfloat16 sum in place; arguments as for `random_bits`."""
    total.copy_(to_bfloat16(total.float() + values.float(), random_bits(place, total.numel())))


def _mixed(bits: Tensor) -> Tensor:
    """A bijection of 32 bits; products wrap around."""
    bits = (bits ^ _shifted(bits, 16)) * _MULTIPLIERS[0]
    bits = (bits ^ _shifted(bits, 15)) * _MULTIPLIERS[1]
    return bits ^ _shifted(bits, 15)


def _shifted(bits: Tensor, places: int) -> Tensor:
    """A logical shift to the right: torch's keeps the sign."""
    return (bits >> places) & ((1 << (32 - places)) - 1)
