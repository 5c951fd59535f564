"""Sums, gathers and waits over ranks. In a world of one each of them is the identity."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from voxtral_dist.distributed.world import World

T = TypeVar("T")

# Other collectives end a run when a rank is late by much less. Here the launcher sees who is lost.
_PATIENCE = timedelta(days=30)


def sum_over_ranks(values: Sequence[float], world: World) -> list[float]:
    """The element-wise sum over all ranks, in float64, the same on every rank to the last bit."""
    if world.size == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(total)
    return [float(value) for value in total.tolist()]


class PatientSum:
    """A sum over ranks that come to it hours apart, after work that nobody evens out. All ranks make it together."""

    def __init__(self, world: World) -> None:
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE) if world.size > 1 else None

    def __call__(self, value: int) -> int:
        """The sum of all ranks' values, when the last one has come."""
        total = torch.tensor(value)
        if self._group is not None:
            dist.all_reduce(total, group=self._group)
        return int(total)


def max_over_ranks(values: Sequence[int], world: World) -> list[int]:
    """The element-wise maximum over all ranks, which pass in equally many values."""
    if world.size == 1:
        return list(values)
    largest = torch.tensor(values, dtype=torch.int64, device=world.device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return [int(value) for value in largest.tolist()]


def sum_tensor_over_ranks(tensor: Tensor, world: World) -> None:
    """Replace a tensor by its sum over all ranks, in place."""
    if world.size > 1:
        dist.all_reduce(tensor)


def gather_on_first(value: T, world: World) -> list[T]:
    """On rank 0 what each rank passed in, in the order of ranks; on the others an empty list.

    Values travel as pickles: results and names, not tensors.
    """
    if world.size == 1:
        return [value]
    gathered: list[Any] | None = [None] * world.size if world.is_first else None
    dist.gather_object(value, gathered)
    return gathered or []


def from_first_rank(value: T, world: World) -> T:
    """Rank 0's value, on every rank."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=world.device)
    return box[0]


def ranks_unlike_first(value: object, world: World) -> list[int]:
    """The ranks whose value is not that of rank 0, on every rank; values travel as pickles."""
    gathered = gather_on_first(value, world)
    return from_first_rank([rank for rank, theirs in enumerate(gathered) if theirs != gathered[0]], world)


def wait_for_all(world: World) -> None:
    """Return when every rank has come here."""
    if world.size > 1:
        # A barrier of NCCL guesses the device; a sum on this rank's own device does not.
        sum_over_ranks([0.0], world)
