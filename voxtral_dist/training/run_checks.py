"""Checks at the start of a run: no other run in the same folder, and the same data on all ranks."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from pathlib import Path

from voxtral_dist.distributed.collectives import ranks_unlike_first
from voxtral_dist.distributed.world import World
from voxtral_dist.errors import UserError

# Data workers of a killed rank take some seconds to notice it and end.
_SECONDS_TO_WAIT = 15.0

logger = logging.getLogger(__name__)


def lock_run_dir(run_dir: Path) -> None:
    """Keep other runs out while this process lives, such as ranks that survived a killed launcher.

    Raises:
        UserError: another process on this machine holds the lock.
    """
    descriptor = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT)
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
