"""Settings of this process that torch reads from environment variables: threads, and allocators of memory."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_THREADS = "OMP_NUM_THREADS"
# Pinned blocks above this have exactly the bytes that are asked for, and are freed at once. A micro-batch of up to 17
# windows stays below: pinning memory anew for each one would make the device wait. A power of two, as blocks below are.
_EXACT_PINNED_MB = 16
# The second and third are the older names.
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def limit_threads(num_ranks: int) -> None:
    """Give each rank of this node its part of the cores, unless the user has set `OMP_NUM_THREADS`.

    If each rank had a thread for every core, the spinning threads would slow all of them down more than ten times. The
    limit holds for DeepSpeed's AdamW on CPUs too, which uses the same OpenMP library as torch.

    Args:
        num_ranks: number of ranks on this node; a single one keeps torch's default.
    """
    if num_ranks == 1 or (_THREADS in os.environ and not _is_set_by_torchrun()):
        return
    num_threads = max(1, len(os.sched_getaffinity(0)) // num_ranks)
    # For libraries that are loaded later.
    os.environ[_THREADS] = str(num_threads)
    torch.set_num_threads(num_threads)


def set_allocator_defaults() -> None:
    """Set options of torch's allocators for GPUs, unless the user has set any. Call it before their first use.

    Segments grow, because micro-batches of ever new lengths would fragment memory.
    """
    if not any(name in os.environ for name in _ALLOCATOR_VARIABLES):
        os.environ[_ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


def exact_pinned_bytes() -> int | None:
    """Bytes above which `pin_large_tensors_exactly` pins no more than is asked for; None if this torch cannot."""
    # torch refuses options that it does not know; 2.11 does not know this one.
    return _EXACT_PINNED_MB * 2**20 if torch.__version__ >= "2.13" else None


def pin_large_tensors_exactly() -> None:
    """Make torch pin large tensors in their own size, and return them to the system when they are freed.

    By default it pins the next power of two and keeps what is freed, which costs offloaded states a third more. Call it
    before they are pinned. It does nothing where the user has set one of the options that begin with `pinned_max`, or
    where torch does not know this one. `pinned_max_round_threshold_mb` alone is no substitute: torch 2.13 keeps blocks
    of different sizes in one list, and may hand out one that is too small (pytorch/pytorch#192722).
    """
    if exact_pinned_bytes() is None or any("pinned_max" in os.environ.get(name, "") for name in _ALLOCATOR_VARIABLES):
        return
    options = [torch._C._accelerator_getAllocatorSettings(), f"pinned_max_cached_size_mb:{_EXACT_PINNED_MB}"]
    torch._C._accelerator_setAllocatorSettings(",".join(option for option in options if option))


def set_compile_cache(cache_dir: Path | None) -> None:
    """Keep what torch.compile and Triton compile in a folder inside `cache_dir`, unless the user has chosen one.

    By default torch keeps it in the folder for temporary files, which containers and many clusters empty.
    """
    if cache_dir is not None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir.absolute() / "torch-compile"))


def _is_set_by_torchrun() -> bool:
    """Whether torchrun has set `OMP_NUM_THREADS` to 1, as it does where the user has not set it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ[_THREADS] != "1":
        return False
    try:
        # The environment that torchrun was started with, without what it has set since.
        variables = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return not any(variable.startswith(f"{_THREADS}=".encode()) for variable in variables)
