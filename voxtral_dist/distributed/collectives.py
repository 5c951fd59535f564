"""Reductions, gathers and barriers over ranks. In a world of size 1 each of them is the identity."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # public classes all the same
from torch.distributed.distributed_c10d import _get_default_store

from voxtral_dist.distributed.world import World

T = TypeVar("T")

_POLL_SECONDS = 0.5
# Keys of a sum in the store.
_SUM, _ARRIVED, _READ = "sum", "arrived", "read"


def sum_over_ranks(values: Sequence[float], world: World) -> list[float]:
    """The element-wise sum over all ranks in float64, bitwise equal on every rank."""
    if world.size == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(total)
    return [float(value) for value in total.tolist()]


class PatientSum:
    """A sum over ranks that may arrive hours apart, after unequal work. All ranks construct it together.

    Ranks count in the process group's store: a collective would time out, and a group of its own for it would need a
    host name by which nodes reach each other.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        # A unique name, because the store lives as long as the run.
        self._name = from_first_rank(uuid.uuid4().hex, world)

    def __call__(self, value: int) -> int:
        """The sum of all ranks' values; blocks until the last rank arrives. Call it once."""
        if self._world.size == 1:
            return value
        store = PrefixStore(self._name, _get_default_store())
        store.add(_SUM, value)
        _count_and_wait(store, _ARRIVED, self._world.size)
        total = store.add(_SUM, 0)
        # Rank 0 may host the store.
        _count_and_wait(store, _READ, self._world.size if self._world.is_first else 0)
        return total


def _count_and_wait(store: Store, key: str, number: int) -> None:
    """Add one to a counter, and wait until it has reached a number."""
    store.add(key, 1)
    while store.add(key, 0) < number:
        time.sleep(_POLL_SECONDS)


def max_over_ranks(values: Sequence[int], world: World) -> list[int]:
    """The element-wise maximum over all ranks, which must pass the same number of values."""
    if world.size == 1:
        return list(values)
    largest = torch.tensor(values, dtype=torch.int64, device=world.device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return [int(value) for value in largest.tolist()]


def sum_tensor_over_ranks(tensor: Tensor, world: World) -> None:
    """Replace a tensor by its sum over all ranks, in place."""
    if world.size > 1:
        dist.all_reduce(tensor)


def sum_tensor_on_rank(tensor: Tensor, rank: int, world: World) -> None:
    """Replace a tensor by its sum over all ranks on one rank, in place; on the others it is undefined afterwards."""
    if world.size > 1:
        dist.reduce(tensor, dst=rank)


def gather_on_first(value: T, world: World) -> list[T]:
    """The values of all ranks in the order of ranks, on rank 0; an empty list on others.

    Values are pickled: use it for results and names, not for tensors.
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


def first_over_ranks(value: T | None, world: World) -> T | None:
    """The value of the first rank that has one, on every rank; None if no rank has. Values are pickled."""
    values = (theirs for theirs in gather_on_first(value, world) if theirs is not None)
    return from_first_rank(next(values, None), world)


def ranks_unlike_first(value: object, world: World) -> list[int]:
    """The ranks whose value differs from rank 0's, on every rank; values are pickled."""
    gathered = gather_on_first(value, world)
    return from_first_rank([rank for rank, theirs in enumerate(gathered) if theirs != gathered[0]], world)


def wait_for_all(world: World) -> None:
    """Block until every rank has called this."""
    if world.size > 1:
        # NCCL's barrier guesses the device; a sum uses this rank's own.
        sum_over_ranks([0.0], world)
