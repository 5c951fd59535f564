"""Where DeepSpeed's compiled extensions are kept, and the locks that a killed build leaves there."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

from voxtral_dist.errors import UserError

log = logging.getLogger(__name__)

# No extension takes longer to build, on two slow cores.
_LONGEST_BUILD_SECONDS = 20 * 60


def extension_locks() -> list[Path]:
    """The lock files of builds of DeepSpeed's extensions that run now, or were killed."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    return sorted(root.glob("**/deepspeed_*/lock"))


def old_locks() -> list[tuple[Path, float]]:
    """Locks that are older than any build, with their age in seconds."""
    return [(lock, age) for lock, age in _ages() if age > _LONGEST_BUILD_SECONDS]


def refuse_old_locks() -> None:
    """Say at the start what would otherwise be waited for in silence, maybe forever.

    Raises:
        UserError: a lock is older than any build.
    """
    for lock, age in _ages():
        if age > _LONGEST_BUILD_SECONDS:
            raise UserError(
                f"The lock {lock} is {age / 60:.0f} minutes old: a build of DeepSpeed's extensions was killed, and "
                "every start would wait for it forever. Run `voxtral-dist doctor`, which removes it and builds."
            )
        log.warning(
            "The lock %s says that another process has been building for %.0f s, and this one may wait for it. If "
            "there is none, stop this run and remove the lock.",
            lock,
            age,
        )


def _ages() -> Iterator[tuple[Path, float]]:
    for lock in extension_locks():
        try:
            yield lock, time.time() - lock.stat().st_mtime
        except FileNotFoundError:
            continue
