"""The store by which the ranks of a run meet."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import socket
import time
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # public classes all the same

from voxtral_dist.errors import LostPeerError, UserError, first_line

_worlds = itertools.count()
_NUM_ARRIVED = "arrived"
# Pauses between looks at the store grow from the first to the second.
_FIRST_POLL_SECONDS, _POLL_SECONDS = 0.005, 0.5
# When the first rank that has come says for the first time for whom it waits; then at twice that time, and so on.
_SILENT_SECONDS = 60.0

log = logging.getLogger(__name__)


def meet(address: str, port: int, rank: int, timeout: timedelta) -> Store:
    """The store of a new world, which rank 0 or torchrun's agent hosts.

    Unlike torch's own rendezvous, rank 0 does not wait here for all others to connect, because nothing could end that
    wait if another rank fails before.

    Args:
        address: host of the store.
        port: its port.
        rank: of this process.
        timeout: limit of connecting.

    Raises:
        LostPeerError: rank 0 was not reached.
        UserError: rank 0 cannot listen on the port.
    """
    # The agent's store outlives ranks that it starts again, and a process may join several worlds. Agents that have
    # come later have counted fewer restarts, so the count is no name for a store that ranks host.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if _is_hosted_by_agent() else "0"
    started = time.monotonic()
    try:
        connection = _connection(address, port, rank == 0, timeout)
    except RuntimeError as error:
        if rank == 0 and not _is_hosted_by_agent():
            raise UserError(
                f"Rank 0 cannot listen on port {port} of {address} ({first_line(error)}): end what uses it, or set "
                "another MASTER_PORT on all hosts."
            ) from error
        raise LostPeerError(
            f"Rank {rank} on {socket.gethostname()} has not reached rank 0 at {address}:{port} for "
            f"{time.monotonic() - started:.0f} s (`distributed.start_timeout_seconds`): check that the command was "
            "started on its host and that the port is open. Rerun the same command on all hosts to resume.",
            lost_ranks=[0],
        ) from error
    return PrefixStore(f"attempt-{attempt}/world-{next(_worlds)}", connection)


def wait_for_ranks(store: Store, rank: int, size: int, limit: timedelta) -> None:
    """Wait until all ranks have come to the store, because a process group waits for them in silence.

    Raises:
        LostPeerError: one has not within the limit.
    """
    arrivals = PrefixStore("arrivals", store)
    arrivals.set(str(rank), socket.gethostname())
    arrivals.add(_NUM_ARRIVED, 1)
    started = time.monotonic()
    pause, next_word = _FIRST_POLL_SECONDS, _SILENT_SECONDS
    while arrivals.add(_NUM_ARRIVED, 0) < size:
        waited = time.monotonic() - started
        # Not at every poll, because it asks for each of perhaps thousands.
        if waited > min(next_word, limit.total_seconds()):
            missing = [other for other in range(size) if not arrivals.check([str(other)])]
            named = f"the ranks {missing[:8]} ({len(missing)} of {size})"
            if missing and waited > limit.total_seconds():
                hosts = {arrivals.get(str(other)).decode() for other in range(size) if other not in missing}
                raise LostPeerError(
                    f"Nothing was heard of {named} within {waited:.0f} s of the start of rank {rank} "
                    f"(`distributed.start_timeout_seconds`); there are ranks on {', '.join(sorted(hosts)[:8])}. Check "
                    "that the command was started on every host. Rerun the same command on all hosts to resume.",
                    missing,
                )
            if all(other in missing for other in range(rank)):
                log.warning("Waiting for %s since %.0f s.", named, waited)
            next_word *= 2
        time.sleep(pause)
        pause = min(2 * pause, _POLL_SECONDS)


@functools.cache
def _connection(address: str, port: int, is_first: bool, timeout: timedelta) -> TCPStore:
    """The connection of this process, cached: rank 0 hosts the store as long as its process lives."""
    return TCPStore(
        address,
        port,
        is_master=is_first and not _is_hosted_by_agent(),
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,
    )


def _is_hosted_by_agent() -> bool:
    """Whether torchrun's agent hosts the store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
