"""GPUs that a scheduler names by UUID, on a machine with the package nvidia-ml-py."""

from types import SimpleNamespace

import pytest
import torch
from deepspeed.accelerator import cuda_accelerator

from voxtral_dist.engine.zero import initializing


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> cuda_accelerator.CUDA_Accelerator:
    """DeepSpeed's view of a GPU with 10 of 24 GB allocated, of which NVML says that 5 are free."""
    gpu = cuda_accelerator.CUDA_Accelerator()
    nvml = SimpleNamespace(
        nvmlDeviceGetHandleByIndex=lambda number: {3: "handle"}[number],
        nvmlDeviceGetMemoryInfo=lambda _handle: SimpleNamespace(free=5),
    )
    monkeypatch.setattr(cuda_accelerator, "pynvml", nvml)
    monkeypatch.setattr(initializing, "get_accelerator", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(total_memory=24))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: 10)
    return gpu


@pytest.mark.parametrize("name", ["GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "MIG-GPU-8932f937/1/0", "0,MIG-1"])
def test_a_gpu_that_is_named_needs_no_number(accelerator, monkeypatch, name):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", name)
    with pytest.raises(ValueError, match="invalid literal for int"):
        accelerator.available_memory(0)
    initializing._avoid_nvml()
    assert accelerator.available_memory(0) == 14


def test_a_gpu_that_has_a_number_is_asked_for(accelerator, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 4")
    initializing._avoid_nvml()
    assert accelerator.available_memory(0) == 5
