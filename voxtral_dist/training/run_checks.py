"""Checks at the start of a run: one folder for all ranks, no other run in it, and the same data on all ranks."""

from __future__ import annotations

import fcntl
import logging
import os
import time
import uuid
from pathlib import Path

from voxtral_dist.distributed.collectives import first_over_ranks, from_first_rank, gather_on_first, ranks_unlike_first
from voxtral_dist.distributed.world import World
from voxtral_dist.errors import SharedWriteError, UserError, write_reason
from voxtral_dist.files import write_errors_named

# Data workers of a killed rank take some seconds to notice it and end.
_SECONDS_TO_WAIT = 15.0
# A network file system may show a new file late.
_SECONDS_TO_APPEAR = 5.0

logger = logging.getLogger(__name__)


def lock_run_dir(run_dir: Path) -> None:
    """Keep other runs out while this process lives, such as ranks that survived a killed launcher.

    Raises:
        UserError: another process on this machine holds the lock.
        WriteError: the file of the lock cannot be made.
    """
    with write_errors_named("`run_dir`: a file", run_dir):
        descriptor = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    deadline = time.monotonic() + _SECONDS_TO_WAIT
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"`run_dir`: another process on this machine writes to {run_dir}: end it, or choose another folder."
                ) from error
            time.sleep(0.5)
        except OSError:
            return logger.warning(
                "%s is on a file system without locks: make sure that no second run writes to it.", run_dir
            )


def refuse_unshared(run_dir: Path, world: World) -> None:
    """Refuse a `run_dir` that is another folder on some ranks: each would hold a part of every checkpoint.

    All ranks call it together: they look for a file that rank 0 writes.

    Raises:
        UserError: a rank does not see it, on all ranks.
        SharedWriteError: rank 0 cannot write it, on all ranks.
    """
    if world.size == 1:
        return
    file = run_dir / from_first_rank(f".shared-{uuid.uuid4().hex}", world)
    failure = None
    try:
        if world.is_first:
            file.touch()
    except OSError as error:
        failure = f"`run_dir`: {run_dir} cannot be written: {write_reason(error)}."
    failure = first_over_ranks(failure, world)
    if failure is not None:
        raise SharedWriteError(failure)
    seen = gather_on_first(_appears(file), world)
    blind = from_first_rank([rank for rank, is_seen in enumerate(seen) if not is_seen], world)
    if world.is_first:
        file.unlink(missing_ok=True)
    if blind:
        raise UserError(
            f"`run_dir`: the ranks {blind[:8]} ({len(blind)} of {world.size}) do not see what rank 0 writes to "
            f"{run_dir}: it must be one folder on storage that all nodes share, because every rank writes a part of "
            "each checkpoint."
        )


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + _SECONDS_TO_APPEAR
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def refuse_different_data(fingerprint: str, world: World) -> None:
    """Refuse ranks with different plans: they would train on mismatched steps and hang at the end.

    Raises:
        UserError: a rank has other shards or another index than rank 0.
    """
    different = ranks_unlike_first(fingerprint, world)
    if different:
        raise UserError(
            f"`train_data`: the ranks {different[:8]} see other shards, another index or other context words than rank "
            "0: copy the shard sets and word lists to all nodes again, or put them on shared storage."
        )
