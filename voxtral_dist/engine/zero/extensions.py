"""DeepSpeed's compiled extensions: building them, and the locks that killed builds leave behind.

DeepSpeed is imported where it is used, because runs look for locks before they import it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

from voxtral_dist.errors import UserError

log = logging.getLogger(__name__)

# Longer than any extension takes to build on two slow cores.
_LONGEST_BUILD_SECONDS = 20 * 60


def build_extensions(with_offload: bool, with_nvme: bool) -> None:
    """Compile the extensions that runs on this machine load, unless they are cached.

    Raises:
        UserError: libaio is missing.
    """
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        get_accelerator().create_op_builder("ShareMemCommBuilder").load()
    if with_offload or with_nvme:
        get_accelerator().create_op_builder("CPUAdamBuilder").load()
    if with_nvme:
        refuse_without_libaio()
        get_accelerator().create_op_builder("AsyncIOBuilder").load()


def refuse_without_libaio() -> None:
    """Refuse NVMe offload without libaio, which would end in a compiler's traceback.

    Raises:
        UserError: libaio's header or library is missing.
    """
    from deepspeed.accelerator import get_accelerator

    if not get_accelerator().create_op_builder("AsyncIOBuilder").is_compatible():
        raise UserError(
            "Offloading to NVMe needs libaio and its headers (Debian: `apt install libaio-dev`; elsewhere point CFLAGS "
            "and LDFLAGS to them). Then build DeepSpeed's extension by `voxtral-dist doctor --with-nvme`."
        )


def extension_locks() -> list[Path]:
    """Lock files of builds of DeepSpeed's extensions, running or killed."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    return sorted(root.glob("**/deepspeed_*/lock"))


def old_locks() -> list[tuple[Path, float]]:
    """Locks older than any build takes, with their age in seconds."""
    return [(lock, age) for lock, age in _ages() if age > _LONGEST_BUILD_SECONDS]


def refuse_old_locks() -> None:
    """Refuse to start where DeepSpeed would silently wait for a killed build; warn about a recent lock.

    Raises:
        UserError: a lock is older than any build takes.
    """
    for lock, age in _ages():
        if age > _LONGEST_BUILD_SECONDS:
            raise UserError(
                f"The lock {lock} is {age / 60:.0f} minutes old: a build of DeepSpeed's extensions was killed, and "
                "every run would wait for it forever. Run `voxtral-dist doctor`, which removes the lock and builds."
            )
        log.warning(
            "Another process has been building DeepSpeed's extensions for %.0f s, says the lock %s, and this run may "
            "wait for it. If there is no such process, stop this run and remove the lock.",
            age,
            lock,
        )


def _ages() -> Iterator[tuple[Path, float]]:
    for lock in extension_locks():
        try:
            yield lock, time.time() - lock.stat().st_mtime
        except FileNotFoundError:
            continue
