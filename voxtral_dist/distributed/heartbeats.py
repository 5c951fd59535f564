"""Signs of life of all ranks in their store, and the sentence about ranks that give none."""

from __future__ import annotations

import json
import os
import re
import socket
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from torch.distributed import DistError, PrefixStore, Store  # type: ignore[attr-defined]  # public all the same

from voxtral_dist.errors import LostPeerError, first_line
from voxtral_dist.output.counting import counted

# Of a rank that is gone no sign comes in this time; others give one each second.
SILENT_SECONDS = 5.0
# Messages of gloo, NCCL and torch about another process that is gone or does not answer.
_LOST = re.compile(
    r"closed by peer|reset by peer|broken pipe|timed out|timeout|ncclRemoteError|remote process|was aborted",
    re.IGNORECASE,
)
_RESUME = "Rerun the same command on all hosts to resume."


class Heartbeats:
    """The last sign of life of each rank: its time by the rank's clock, its host and its process."""

    def __init__(self, store: Store, rank: int, size: int, neighbour: int | None = None) -> None:
        """Take signs from a store.

        Args:
            store: used by the calling thread alone.
            rank: of this process.
            size: number of ranks.
            neighbour: the rank whose process this one looks at, if it is one of the same system; None for none.
        """
        self._store = PrefixStore("beats", store)
        self._rank = rank
        self._size = size
        self._neighbour = None if neighbour == rank else neighbour
        self._system = _system()
        # The neighbour's process, as soon as it is known.
        self._neighbour_process: int | None = None
        self._seen: dict[int, tuple[bytes, float]] = {}

    def beat(self) -> None:
        """Give a sign of life."""
        sign = [time.time(), socket.gethostname(), self._system, os.getpid()]
        self._store.set(str(self._rank), json.dumps(sign))

    def leave(self) -> None:
        """Say that this rank gives no more signs of life, because it has finished."""
        self._store.set(str(self._rank), "")

    def has_left(self, rank: int) -> bool:
        """Whether a rank has finished."""
        return bool(self._store.check([str(rank)])) and not self._store.get(str(rank))

    def silent_seconds(self) -> dict[int, float]:
        """Seconds in which no sign of each rank has come to this one, between its first call and now."""
        now = time.monotonic()
        for rank in range(self._size):
            value = self._value(rank)
            last, _ = self._seen.get(rank, (None, now))
            if value != last:
                self._seen[rank] = (value, now)
        return {rank: now - at for rank, (_, at) in self._seen.items()}

    def lost(self, seconds: float) -> list[int]:
        """The ranks that have come, have not finished, and have given no sign for so long, as this one has seen."""
        silent = self.silent_seconds()
        return [rank for rank in silent if silent[rank] >= seconds and self._seen[rank][0]]

    def is_neighbour_gone(self) -> bool:
        """Whether the neighbour's process has ended before the rank has finished.

        The store is asked once for the process, and again when that has ended.
        """
        if self._neighbour is None:
            return False
        if self._neighbour_process is not None and not _has_ended(self._neighbour_process):
            return False
        value = self._value(self._neighbour)
        if not value:
            # It has not come yet, or it has finished, which it says before its process ends.
            return False
        known = self._neighbour_process
        _, host, system, self._neighbour_process = json.loads(value)
        if not system or [host, system] != [socket.gethostname(), self._system]:
            self._neighbour = None
            return False
        return self._neighbour_process == known

    def loss_of_neighbour(self) -> LostPeerError:
        """What is known of a neighbour whose process is gone."""
        assert self._neighbour is not None
        self._seen[self._neighbour] = (self._value(self._neighbour), time.monotonic())
        return self.loss([self._neighbour])

    def _value(self, rank: int) -> bytes:
        found: bytes = self._store.get(str(rank)) if self._store.check([str(rank)]) else b""
        return found

    def loss(self, lost: Sequence[int]) -> LostPeerError:
        """What is known of ranks that give no sign of life."""
        parts = []
        for rank in lost[:8]:
            value = self._seen[rank][0]
            if value:
                at, host, *_ = json.loads(value)
                parts.append(f"{rank} on {host} since {time.strftime('%H:%M:%S', time.localtime(at))}")
            else:
                parts.append(str(rank))
        return LostPeerError(
            f"Nothing is heard of {len(lost)} of {counted(self._size, 'rank')} ({'; '.join(parts)}): their processes, "
            f"hosts or network are gone. {_RESUME}",
            lost,
        )


def _system() -> str:
    """What processes have in common that see each other's numbers; empty where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _has_ended(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    # Its parent may not have looked yet.
    return state in ("Z", "X")


def loss_of_store(seconds: float) -> LostPeerError:
    """What a rank says that has lost the store, and so all others, for some seconds."""
    host = os.environ.get("MASTER_ADDR", "its host")
    return LostPeerError(
        f"Nothing is heard of rank 0, which keeps the ranks together, on {host} for {seconds:.0f} s: its process, host "
        f"or network is gone. {_RESUME}",
        lost_ranks=[0],
    )


def vain_wait(rank: int, error: str, limit_seconds: float) -> LostPeerError:
    """What a rank says whose collective has failed, although all ranks give signs of life."""
    return LostPeerError(
        f"Rank {rank} on {socket.gethostname()} has waited for another rank in vain ({error}): the network between "
        "hosts was cut, or a rank worked alone for longer than `distributed.timeout_seconds` "
        f"({limit_seconds:.0f}). {_RESUME}"
    )


@contextmanager
def lost_peers_as_message(store: Store, rank: int, size: int, timeout: timedelta) -> Iterator[None]:
    """Name the ranks that are gone, where a collective fails because of them.

    Raises:
        LostPeerError: a library's error says that another process is gone, or does not answer.
    """
    try:
        yield
    except RuntimeError as error:
        if size == 1 or not _LOST.search(str(error)) or not _is_of_collective(error):
            raise
        started = time.monotonic()
        # If a rank has failed, and not only gone, the failure watch ends this process meanwhile.
        try:
            beats = Heartbeats(store.clone(), rank, size)  # type: ignore[attr-defined]  # missing in torch's stubs
            beats.silent_seconds()
            time.sleep(SILENT_SECONDS)
            lost = beats.lost(SILENT_SECONDS)
        except RuntimeError:
            raise loss_of_store(time.monotonic() - started) from error
        if lost:
            raise beats.loss(lost) from error
        raise vain_wait(rank, first_line(error)[:200], timeout.total_seconds()) from error


def _is_of_collective(error: RuntimeError) -> bool:
    """Whether an error comes from torch's collectives or their store, by its traceback."""
    if isinstance(error, DistError):
        return True
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return any(part in file for file in files for part in ("/torch/distributed/", "/deepspeed/"))
