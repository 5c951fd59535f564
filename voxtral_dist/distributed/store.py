"""The store by which the ranks of a run meet."""

from __future__ import annotations

import functools
import itertools
import os
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # public classes all the same

_worlds = itertools.count()


def meet(address: str, port: int, rank: int, timeout: timedelta) -> Store:
    """The store of a new world, which rank 0 or torchrun's agent hosts.

    Unlike torch's own rendezvous, rank 0 does not wait here for all others to connect, because nothing could end that
    wait if another rank fails before.

    Args:
        address: host of the store.
        port: its port.
        rank: of this process.
        timeout: limit of connecting, and of later waits for keys.
    """
    # The agent's store outlives ranks that it starts again, and a process may join several worlds.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"attempt-{attempt}/world-{next(_worlds)}", _connection(address, port, rank == 0, timeout))


@functools.cache
def _connection(address: str, port: int, is_first: bool, timeout: timedelta) -> TCPStore:
    """The connection of this process, cached: rank 0 hosts the store as long as its process lives."""
    is_hosted_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return TCPStore(
        address,
        port,
        is_master=is_first and not is_hosted_by_agent,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,
    )
