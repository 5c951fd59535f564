"""Where DeepSpeed's compiled extensions are kept, and the locks that a killed build leaves there."""

from __future__ import annotations

import os
import time
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

from voxtral_dist.errors import UserError

# No extension takes longer to build, on two slow cores.
_LONGEST_BUILD_SECONDS = 20 * 60


def extension_locks() -> list[Path]:
    """The lock files of builds that run now, or were killed."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    return sorted(root.glob("**/lock"))


def refuse_stale_locks() -> None:
    """Say at the start what would otherwise be waited for in silence, forever.

    Raises:
        UserError: a lock is older than any build.
    """
    for lock in extension_locks():
        try:
            age_seconds = time.time() - lock.stat().st_mtime
        except FileNotFoundError:
            continue
        if age_seconds > _LONGEST_BUILD_SECONDS:
            raise UserError(
                f"The lock {lock} is {age_seconds / 60:.0f} minutes old: a build of DeepSpeed's extensions was killed, "
                "and every start would wait for it forever. Run `voxtral-dist doctor`, which removes it and builds."
            )
