"""What DeepSpeed needs before it builds an engine."""

from __future__ import annotations

import os

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups

from voxtral_dist.distributed.world import set_timeouts


def prepare_deepspeed() -> None:
    """Make DeepSpeed's copy of the group of all ranks, and keep it from NVML where it would fail.

    DeepSpeed would make that group, with a timeout of 10 minutes, after ranks have read weights for different times.
    """
    deepspeed.init_distributed()
    groups._get_data_parallel_group()
    set_timeouts()
    _avoid_nvml()


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
