"""Reductions, gathers and barriers over ranks. In a world of size 1 each of them is the identity."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]  # public all the same
from torch.distributed.distributed_c10d import _get_default_store

from voxtral_dist.distributed.devices import on_device
from voxtral_dist.distributed.world import World
from voxtral_dist.errors import LostPeerError

T = TypeVar("T")

log = logging.getLogger(__name__)

# Pauses grow from the first to the second.
_FIRST_POLL_SECONDS, _POLL_SECONDS = 0.005, 0.5
# When a rank says for the first time that it waits; then at twice that time, and so on.
_SILENT_SECONDS = 60.0
# Between two signs of life.
_LONGEST_BEAT_SECONDS = 10.0
# Keys of a sum in the store.
_SUM, _ARRIVED, _READ = "sum", "arrived", "read"


def sum_over_ranks(values: Sequence[float], world: World) -> list[float]:
    """The element-wise sum over all ranks in float64, bitwise equal on every rank."""
    if world.size == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(total)
    return [float(value) for value in total.tolist()]


class RankRows:
    """A row of numbers of each rank, on every rank. All ranks construct it together, with rows of the same length.

    The exchange begins at once, behind what the device still computes; only `read` waits for it.
    """

    def __init__(self, values: Sequence[float], world: World, computed: Tensor | None = None) -> None:
        """Begin the exchange.

        Args:
            values: the row of this rank, or its end.
            world: all ranks.
            computed: its beginning, on the device, of any type; None if there is none.
        """
        parts = [] if computed is None else [computed.detach().reshape(-1).to(torch.float64)]
        parts.append(on_device(torch.tensor(values, dtype=torch.float64), world.device))
        row = torch.cat(parts)
        # A sum of rows of which one is not zero: one collective operation, exact, and in every backend.
        self._rows = torch.zeros(world.size, len(row), dtype=torch.float64, device=world.device)
        self._rows[world.rank].copy_(row)
        if world.size > 1:
            dist.all_reduce(self._rows)

    def read(self) -> list[list[float]]:
        """The rows in the order of ranks, bitwise equal on every rank, after a wait for the device."""
        rows: list[list[float]] = self._rows.tolist()
        return rows


def fresh_store(world: World) -> Store:
    """A part of the store through which the ranks met that nobody has used; all ranks call it together.

    The name is unique, because the store lives as long as the run. A world of one process has no shared store.
    """
    name = from_first_rank(uuid.uuid4().hex, world)
    return PrefixStore(name, _get_default_store() if world.size > 1 else HashStore())


class PatientSum:
    """A sum over ranks that may arrive hours apart, after unequal work. All ranks construct it together.

    Ranks count in the process group's store: a collective would time out, and a group of its own for it would need a
    host name by which nodes reach each other. A thread of each rank counts there too until the rank arrives, so a rank
    that works for long is told from one that is gone. One of the ranks that wait says for whom: after a minute, two
    minutes, four and so on.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._arrived = threading.Event()
        if world.size > 1:
            self._store = fresh_store(world)
            self._beat_seconds = min(_LONGEST_BEAT_SECONDS, world.timeout.total_seconds() / 4)
            threading.Thread(target=self._beat, name="patient-sum", daemon=True).start()

    def __call__(self, value: int) -> int:
        """The sum of all ranks' values; blocks until the last rank arrives. Call it once.

        Raises:
            LostPeerError: the process of a rank is gone, for as long as a collective would wait.
        """
        self._arrived.set()
        if self._world.size == 1:
            return value
        self._store.add(_SUM, value)
        self._store.set(_arrival(self._world.rank), "")
        self._count_and_wait(_ARRIVED, self._world.size)
        total = self._store.add(_SUM, 0)
        # Rank 0 may host the store.
        self._count_and_wait(_READ, self._world.size if self._world.is_first else 0)
        return total

    def _beat(self) -> None:
        # An error of the store: its host has left.
        with suppress(RuntimeError):
            while not self._arrived.wait(self._beat_seconds):
                self._store.add(_life(self._world.rank), 1)

    def _count_and_wait(self, key: str, number: int) -> None:
        """Add one to a counter, and wait until it has reached a number."""
        self._store.add(key, 1)
        started = time.monotonic()
        pause, next_look, next_word = _FIRST_POLL_SECONDS, started + self._beat_seconds, started + _SILENT_SECONDS
        heard: dict[int, tuple[int, float]] = {}
        while self._store.add(key, 0) < number:
            time.sleep(pause)
            pause = min(2 * pause, _POLL_SECONDS)
            now = time.monotonic()
            if key == _ARRIVED and now >= next_look:
                missing = self._missing()
                self._refuse_gone(missing, heard, now)
                next_look = now + self._beat_seconds
                if now >= next_word:
                    self._say(missing, now - started)
                    next_word = now + (now - started)

    def _missing(self) -> list[int]:
        return [rank for rank in range(self._world.size) if not self._store.check([_arrival(rank)])]

    def _refuse_gone(self, missing: Sequence[int], heard: dict[int, tuple[int, float]], now: float) -> None:
        """Refuse to wait for ranks whose count does not grow; `heard` holds the last one of each, and its time."""
        for rank in missing:
            count = self._store.add(_life(rank), 0)
            last, at = heard.get(rank, (-1, now))
            heard[rank] = (last, at) if count == last else (count, now)
        limit = self._world.timeout.total_seconds()
        gone = [rank for rank in missing if now - heard[rank][1] > limit]
        if gone:
            raise LostPeerError(
                f"Nothing was heard of the ranks {gone[:8]} ({len(gone)} of {self._world.size}) for {limit:.0f} s "
                "(`distributed.timeout_seconds`): their processes or nodes are gone. Rerun the same command to resume.",
                gone,
            )

    def _say(self, missing: Sequence[int], seconds: float) -> None:
        """Name the ranks that have not arrived, on the first rank that has."""
        if all(rank in missing for rank in range(self._world.rank)):
            log.warning(
                "Waiting for the ranks %s (%d of %d) since %.0f s.",
                missing[:8],
                len(missing),
                self._world.size,
                seconds,
            )


def _arrival(rank: int) -> str:
    return f"arrived-{rank}"


def _life(rank: int) -> str:
    return f"alive-{rank}"


def computed_on_first(compute: Callable[[], T], world: World) -> T:
    """The value of a long computation on rank 0, on every rank.

    The others wait for it without a limit, because no collective is open meanwhile. All ranks call it together.
    """
    if world.size == 1:
        return compute()
    arrive = PatientSum(world)
    value = compute() if world.is_first else None
    arrive(0)
    return from_first_rank(cast(T, value), world)


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


def scatter_from_first(values: Sequence[T], world: World) -> T:
    """The value that rank 0 has for this rank; `values` holds one for each rank there. Values are pickled."""
    if world.size == 1:
        return values[0]
    box: list[Any] = [None]
    dist.scatter_object_list(box, list(values) if world.is_first else None, src=0)
    return cast(T, box[0])


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
