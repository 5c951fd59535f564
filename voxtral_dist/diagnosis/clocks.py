"""Differences between the clocks of hosts, measured through the ranks' store."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # public classes all the same

# Of several exchanges the shortest one counts: it bounds the error by half its time.
_NUM_EXCHANGES = 8


def seconds_ahead(store: Store, rank: int, others: Sequence[int]) -> float:
    """How far the clock of this rank is ahead of rank 0's, in seconds; rank 0 answers the others one after the other.

    Args:
        store: of all ranks; only rank 0 and the others call this, together.
        rank: of this process.
        others: the ranks whose clocks are compared with rank 0's, in the same order everywhere.
    """
    clocks = PrefixStore("clocks", store)
    if rank == 0:
        for other in others:
            for exchange in range(_NUM_EXCHANGES):
                clocks.get(f"question-{other}-{exchange}")
                clocks.set(f"answer-{other}-{exchange}", repr(time.time()))
        return 0.0
    measured = []
    for exchange in range(_NUM_EXCHANGES):
        asked_at, started = time.time(), time.monotonic()
        clocks.set(f"question-{rank}-{exchange}", "")
        answer = float(clocks.get(f"answer-{rank}-{exchange}"))
        seconds = time.monotonic() - started
        if exchange > 0:
            # The first one waits for its turn.
            measured.append((seconds, asked_at + seconds / 2 - answer))
    return min(measured)[1]
