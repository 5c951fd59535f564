"""The store by which the ranks of a run meet."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # public classes all the same

from voxtral_dist.errors import LostPeerError, UserError, first_line

_worlds = itertools.count()
_NUM_ARRIVED = "arrived"
# Pauses between looks at the store grow from the first to the second.
_FIRST_POLL_SECONDS, _POLL_SECONDS = 0.005, 0.5
_TELLING_SECONDS = 0.1
# When the first rank that has come says for the first time for whom it waits; then at twice that time, and so on.
_SILENT_SECONDS = 60.0

log = logging.getLogger(__name__)


def meet(address: str, port: int, rank: int, size: int, timeout: timedelta) -> Store:
    """The store of a new world, which rank 0 or torchrun's agent hosts.

    Unlike torch's own rendezvous, rank 0 does not wait here for all others to connect, because nothing could end that
    wait if another rank fails before.

    Args:
        address: host of the store.
        port: its port.
        rank: of this process.
        size: number of ranks.
        timeout: limit of connecting.

    Raises:
        LostPeerError: rank 0 was not reached.
        UserError: rank 0 cannot listen on the port.
    """
    started = time.monotonic()
    try:
        connection = _connection(address, port, rank == 0, timeout)
        meeting = _meeting(connection, rank, size, timeout) if _is_hosted_by_agent() else "0"
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
    # A process may join several worlds.
    return PrefixStore(f"meeting-{meeting}/world-{next(_worlds)}", connection)


def _meeting(connection: TCPStore, rank: int, size: int, timeout: timedelta) -> str:
    """A name that only these processes share: torchrun's agent starts ranks again, and its store keeps their keys.

    Rank 0 counts. The agent's number of restarts would not do: it does not count changes of the nodes, and agents of
    nodes that have come later have counted fewer.
    """
    meetings = PrefixStore("meetings", connection)
    if rank == 0:
        name = str(meetings.add("number", 1))
        # Rank 0 does not wait for ranks that may have failed.
        other = meetings.clone()  # type: ignore[attr-defined]  # missing in torch's stubs
        threading.Thread(target=_tell, args=(other, name, size), name="meeting", daemon=True).start()
        return name
    mine = uuid.uuid4().hex
    meetings.set(str(rank), mine)
    meetings.wait([mine], timeout)
    name = meetings.get(mine).decode()
    meetings.add(f"told-{name}", 1)
    return name


def _tell(meetings: Store, name: str, size: int) -> None:
    """Tell the name of a meeting to each process that asks, until all of its ranks know it."""
    told: set[bytes] = set()
    with suppress(RuntimeError):
        while meetings.add(f"told-{name}", 0) < size - 1:
            for key in map(str, range(1, size)):
                # An earlier process of this rank may have asked, and ended.
                asking = meetings.get(key) if meetings.check([key]) else b""
                if asking and asking not in told:
                    meetings.set(asking.decode(), name)
                    told.add(asking)
            time.sleep(_TELLING_SECONDS)


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
