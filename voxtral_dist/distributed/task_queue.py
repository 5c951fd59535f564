"""A task queue over ranks, so that a slow rank does not hold up the others."""

from __future__ import annotations

from collections.abc import Iterator

from voxtral_dist.distributed.collectives import fresh_store
from voxtral_dist.distributed.world import World

_STOPPED = "stopped"
_NEXT = "next"


class TaskQueue:
    """Task numbers from 0, each given to the first rank that asks for it.

    All ranks construct it together and iterate independently. They share a counter in the process group's store, so no
    rank waits for a collective.
    """

    def __init__(self, num_tasks: int, world: World) -> None:
        self._num_tasks = num_tasks
        self._store = fresh_store(world)

    def __iter__(self) -> Iterator[int]:
        """Yield numbers that no other rank has, until none is left or a rank has called `stop`."""
        while not self._store.check([_STOPPED]):
            number = self._store.add(_NEXT, 1) - 1
            if number >= self._num_tasks:
                return
            yield number

    def stop(self) -> None:
        """Keep all ranks from starting another task, because this rank has failed."""
        self._store.set(_STOPPED, "")
