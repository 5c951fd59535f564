"""DeepSpeed's compiled extensions: building them, and the locks that killed builds leave behind.

DeepSpeed is imported where it is used, because runs look for locks before they import it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils import cpp_extension

from voxtral_dist.engine.zero.build_lock import BuildLock
from voxtral_dist.errors import UserError
from voxtral_dist.output.counting import counted

log = logging.getLogger(__name__)

# Longer than any extension takes to build on two slow cores.
_LONGEST_BUILD_SECONDS = 20 * 60
# Before torch 2.14 the file itself is the lock. Since then the kernel holds it and frees it with its process: the file,
# which stays, keeps nobody out.
_FILES_ARE_LOCKS = hasattr(cpp_extension, "FileBaton")


@dataclass(frozen=True)
class Extension:
    """An extension of DeepSpeed, by its own name and that of its builder."""

    name: str
    builder: str

    @property
    def is_prebuilt(self) -> bool:
        """Whether DeepSpeed was installed with it for this device, so that it is loaded and never compiled."""
        from deepspeed.accelerator import get_accelerator
        from deepspeed.git_version_info import accelerator_name, installed_ops

        return bool(installed_ops.get(self.name)) and accelerator_name == get_accelerator().device_name()

    @property
    def is_cached(self) -> bool:
        """Whether torch has compiled it for this user before."""
        return any(_build_root().glob(f"**/{self.name}/{self.name}.so"))

    def load(self) -> None:
        """Load it, and compile it before that unless it is prebuilt or cached."""
        from deepspeed.accelerator import get_accelerator

        use_build_locks()
        get_accelerator().create_op_builder(self.builder).load()


# Messages between the ranks of a CPU run.
_SHARED_MEMORY = Extension("deepspeed_shm_comm", "ShareMemCommBuilder")
_CPU_ADAM = Extension("cpu_adam", "CPUAdamBuilder")
# Loading the last one loads the one before.
_NVME = (Extension("pin_memory", "PinMemoryBuilder"), Extension("async_io", "AsyncIOBuilder"))


def needed_extensions(with_offload: bool, with_nvme: bool) -> tuple[Extension, ...]:
    """The extensions that runs on this machine load; without offload, a run on GPUs loads none."""
    from deepspeed.accelerator import get_accelerator

    communication = (_SHARED_MEMORY,) if get_accelerator().device_name() == "cpu" else ()
    return communication + ((_CPU_ADAM,) if with_offload or with_nvme else ()) + (_NVME if with_nvme else ())


def refuse_without_nvme_support() -> None:
    """Refuse NVMe offload whose extension is neither prebuilt nor can be compiled, which would end in a traceback.

    Raises:
        UserError: CUDA's toolkit, or libaio's header or library is missing.
    """
    from deepspeed.accelerator import get_accelerator

    if all(extension.is_prebuilt for extension in _NVME):
        return
    if get_accelerator().device_name() == "cuda" and cpp_extension.CUDA_HOME is None:
        raise UserError(
            "Offloading to NVMe on a GPU needs CUDA's toolkit, to compile DeepSpeed's extension async_io, but none was "
            f"found: install the toolkit of torch's CUDA ({torch.version.cuda}) and set CUDA_HOME to its folder, or "
            "use the image of docker/Dockerfile, which has the extension."
        )
    if not get_accelerator().create_op_builder("AsyncIOBuilder").is_compatible():
        raise UserError(
            "Offloading to NVMe needs libaio and its headers (Debian: `apt install libaio-dev`; elsewhere point CFLAGS "
            "and LDFLAGS to them). Then build DeepSpeed's extension by `voxtral-dist doctor --with-nvme`."
        )


def use_build_locks() -> None:
    """Let torch take locks that end with their process. Called before DeepSpeed loads an extension."""
    if _FILES_ARE_LOCKS:
        vars(cpp_extension)["FileBaton"] = BuildLock


def extension_locks() -> list[Path]:
    """Files that keep others from building or loading DeepSpeed's extensions, of builds that run or were killed."""
    if not _FILES_ARE_LOCKS:
        return []
    names = [extension.name for extension in (_SHARED_MEMORY, _CPU_ADAM, *_NVME)]
    return sorted(lock for name in names for lock in _build_root().glob(f"**/{name}/lock"))


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
                f"The lock {lock} is {counted(age / 60, 'minute', '.0f')} old: a build of DeepSpeed's extensions was "
                "killed, and every run would wait for it forever. Run `voxtral-dist doctor`, which removes the lock "
                "and builds."
            )
        log.warning(
            "Another process has been building DeepSpeed's extensions for %.0f s, says the lock %s, and this run may "
            "wait for it. If there is no such process, stop this run and remove the lock.",
            age,
            lock,
        )


def _ages() -> Iterator[tuple[Path, float]]:
    """Locks that runs would wait for, with their age in seconds."""
    for lock in extension_locks():
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:
            continue
        own = BuildLock(str(lock))
        if own.take_over():
            own.let_go()
        else:
            yield lock, age


def _build_root() -> Path:
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
