"""Data workers that the system has killed: torch says so by an error of no type of its own, wherever the rank is."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from voxtral_dist.errors import LostWorkerError, first_line

_BEGINNING = "DataLoader worker (pid"


def is_loss_of_worker(error: BaseException | None) -> bool:
    """Whether an error is torch's, or ours, for a data worker of this process that was killed."""
    return isinstance(error, LostWorkerError) or (isinstance(error, RuntimeError) and str(error).startswith(_BEGINNING))


@contextmanager
def lost_workers_as_message(rank: int) -> Iterator[None]:
    """Say what to do about a data worker that was killed.

    Raises:
        LostWorkerError: one was.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_loss_of_worker(error):
            raise
        raise LostWorkerError(
            f"A data worker of rank {rank} on {socket.gethostname()} is gone ({first_line(error).rstrip('. ')}): "
            "mostly the memory of the host, or of /dev/shm, is full. Lower `train_data.num_workers`, or give the host "
            "more memory, and rerun the same command to resume."
        ) from error
