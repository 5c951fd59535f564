"""Tasks handed to whichever rank asks first, so that a slow rank does not hold the others."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]  # public classes all the same
from torch.distributed.distributed_c10d import _get_default_store

from voxtral_dist.distributed.collectives import from_first_rank
from voxtral_dist.distributed.world import World

_STOPPED = "stopped"
_NEXT = "next"


class TaskQueue:
    """The numbers from 0, each of which one rank gets. All ranks make it together, and go through it on their own.

    The ranks share a counter in the store by which they met, so nobody waits for a collective.
    """

    def __init__(self, num_tasks: int, world: World) -> None:
        self._num_tasks = num_tasks
        # A name of its own: the store lives as long as the run.
        name = from_first_rank(uuid.uuid4().hex, world)
        # A world of one has no store by which it met others.
        shared = _get_default_store() if world.size > 1 else HashStore()
        self._store = PrefixStore(name, shared)

    def __iter__(self) -> Iterator[int]:
        """The next number that nobody has, until there is none or a rank has called `stop`."""
        while not self._store.check([_STOPPED]):
            number = self._store.add(_NEXT, 1) - 1
            if number >= self._num_tasks:
                return
            yield number

    def stop(self) -> None:
        """Let no rank begin another task: this one has failed."""
        self._store.set(_STOPPED, "")
