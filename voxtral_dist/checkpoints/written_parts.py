"""What ranks have written of a checkpoint, told by their threads without any collective."""

from __future__ import annotations

import pickle
import time

from voxtral_dist.checkpoints.files import WrittenPart
from voxtral_dist.distributed.collectives import fresh_store
from voxtral_dist.distributed.world import World

_OUTCOME = "outcome"
# Pauses grow from the first to the second.
_FIRST_POLL_SECONDS, _POLL_SECONDS = 0.01, 0.5


class WrittenParts:
    """The parts of all ranks, in the store through which they met: their threads need neither collectives nor the main
    threads, which may be anywhere in a step."""

    def __init__(self, world: World) -> None:
        """All ranks construct it together."""
        self._world = world
        self._store = fresh_store(world)

    def tell(self, part: WrittenPart) -> None:
        """Tell rank 0 what this rank has written."""
        self._store.set(_key(self._world.rank), pickle.dumps(part))  # type: ignore[arg-type]  # bytes, too

    def gather(self) -> list[WrittenPart]:
        """What all ranks have written, on rank 0; waits for the last one without a limit."""
        return [self._take(rank) for rank in range(self._world.size)]

    def end(self, failure: str | None) -> None:
        """Tell all ranks, from rank 0, that the checkpoint is complete, or why it cannot be."""
        self._store.set(_OUTCOME, failure or "")

    def are_complete(self, limit_seconds: float) -> bool:
        """Whether rank 0 says within a time that the checkpoint is complete."""
        return self._has(_OUTCOME, limit_seconds) and not self._store.get(_OUTCOME)

    def _take(self, rank: int) -> WrittenPart:
        self._has(_key(rank), float("inf"))
        part: WrittenPart = pickle.loads(self._store.get(_key(rank)))
        self._store.delete_key(_key(rank))
        return part

    def _has(self, key: str, limit_seconds: float) -> bool:
        # Not the store's own wait, which blocks all other threads of this process that use it.
        deadline, pause = time.monotonic() + limit_seconds, _FIRST_POLL_SECONDS
        while not self._store.check([key]):
            if time.monotonic() > deadline:
                return False
            time.sleep(pause)
            pause = min(2 * pause, _POLL_SECONDS)
        return True


def _key(rank: int) -> str:
    return f"part-{rank}"
