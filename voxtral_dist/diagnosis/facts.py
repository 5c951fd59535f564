"""What a rank tells of its host and its GPU, without measuring anything."""

from __future__ import annotations

import os
import platform
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from voxtral_dist.config import RunConfig
from voxtral_dist.engine.build import check_engine
from voxtral_dist.engine.zero.extensions import needed_extensions, old_locks, refuse_without_nvme_support
from voxtral_dist.engine.zero.settings import OFFLOADS, offload_device, read_deepspeed_file
from voxtral_dist.errors import UserError
from voxtral_dist.training.versions import package_versions

_DRIVER = Path("/proc/driver/nvidia/version")
_SHARED_MEMORY = Path("/dev/shm")
# Data workers pass micro-batches through it, and NCCL its messages between GPUs of a host. Docker's default is 64 MB.
_LEAST_SHARED_BYTES = 10**9
# Of a GPU's memory, besides this process's own context.
_MOST_USED_FRACTION = 0.1


@dataclass(frozen=True)
class RankFacts:
    """What a rank tells.

    Attributes:
        rank: of the process.
        host: the name of its host.
        gpu: its name and memory; "CPU" where there is none.
        driver: version of NVIDIA's driver; None where there is none.
        versions: of packages, Python and CUDA.
        num_cores: that the process may use.
        shared_memory_bytes: free in /dev/shm.
        problems: sentences about what would keep a run from starting or working here.
    """

    rank: int
    host: str
    gpu: str
    driver: str | None
    versions: dict[str, str]
    num_cores: int
    shared_memory_bytes: int
    problems: tuple[str, ...]


def rank_facts(config: RunConfig, rank: int, world_size: int, device: torch.device) -> RankFacts:
    """The facts of this rank for a configuration."""
    free = shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.exists() else 0
    return RankFacts(
        rank=rank,
        host=socket.gethostname(),
        gpu=_gpu(device),
        driver=_driver(),
        versions=package_versions() | {"Python": platform.python_version(), "CUDA": str(torch.version.cuda)},
        num_cores=len(os.sched_getaffinity(0)),
        shared_memory_bytes=free,
        problems=(*_problems(config, world_size, device), *_shared_memory_problems(free), *_gpu_problems(device)),
    )


def _gpu(device: torch.device) -> str:
    if device.type != "cuda":
        return "CPU"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def _driver() -> str | None:
    """The driver's version from a line such as `NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu ...`."""
    try:
        words = _DRIVER.read_text().splitlines()[0].split()
    except (OSError, IndexError):
        return None
    return next((word for word in words if word[0].isdigit() and "." in word), None)


def _problems(config: RunConfig, world_size: int, device: torch.device) -> Sequence[str]:
    """What the engine refuses on this host, and extensions that every run would have to build first."""
    try:
        check_engine(config, world_size, device)
        if config.engine.deepspeed is None:
            return ()
        offloads = {offload_device(read_deepspeed_file(config.engine.deepspeed), name) for name in OFFLOADS}
        if "nvme" in offloads:
            refuse_without_nvme_support()
    except UserError as error:
        return (str(error),)
    stale = [f"a killed build left the lock {lock}: `voxtral-dist doctor` removes it" for lock, _ in old_locks()]
    extensions = needed_extensions("cpu" in offloads, "nvme" in offloads)
    unbuilt = [one.name for one in extensions if not (one.is_prebuilt or one.is_cached)]
    if unbuilt:
        stale.append(f"DeepSpeed's extensions {', '.join(unbuilt)} are not built: `voxtral-dist doctor` builds them")
    return stale


def _shared_memory_problems(free: int) -> Sequence[str]:
    if free >= _LEAST_SHARED_BYTES:
        return ()
    return (
        f"{_SHARED_MEMORY} has {free / 1e6:.0f} MB free, but data workers and NCCL pass messages through it: give "
        f"containers at least {_LEAST_SHARED_BYTES / 1e9:.0f} GB (`docker run --shm-size`, a memory-backed emptyDir)",
    )


def _gpu_problems(device: torch.device) -> Sequence[str]:
    if device.type != "cuda":
        return ()
    free, total = torch.cuda.mem_get_info(device)
    if total - free < _MOST_USED_FRACTION * total:
        return ()
    return (f"GPU {device.index} has {(total - free) / 2**30:.1f} GiB in use by other processes: end them",)
