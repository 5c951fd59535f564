"""What DeepSpeed needs before it builds an engine."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups

from voxtral_dist.distributed.world import set_timeouts
from voxtral_dist.engine.zero.extensions import use_build_locks


def prepare_deepspeed(timeout: timedelta) -> None:
    """Make DeepSpeed's copy of the group of all ranks, and keep it from NVML where it would fail.

    DeepSpeed would make that group, with a timeout of 10 minutes, after ranks have read weights for different times.
    """
    use_build_locks()
    deepspeed.init_distributed()
    _unlink_shared_buffers()
    groups._get_data_parallel_group()
    set_timeouts(timeout)
    _avoid_nvml()


def _unlink_shared_buffers() -> None:
    """Remove the names of the buffers through which DeepSpeed's ranks on CPUs communicate, 66 MB each.

    DeepSpeed never does, so that every run would leave them in /dev/shm. Ranks that have mapped them keep them.
    """
    dist.barrier()
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{address}_{port}_{dist.get_rank()}"):
        path.unlink(missing_ok=True)


def _avoid_nvml() -> None:
    """Make DeepSpeed ask torch for free memory if `CUDA_VISIBLE_DEVICES` holds UUIDs or names of MIG slices.

    DeepSpeed would convert them to NVML's numbers of devices, and fail. Without the package nvidia-ml-py it asks torch.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    if all(device.strip().isdigit() for device in visible.split(",")):
        return
    if get_accelerator().device_name() == "cuda":
        from deepspeed.accelerator import cuda_accelerator

        cuda_accelerator.pynvml = None
