"""Peak throughput of a rank's device, and its peak and free memory."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

from voxtral_dist.errors import UserError

# Dense 10^12 operations per second from NVIDIA's data sheets: for bfloat16 and float16 with accumulation in float32,
# and for float32 without tensor cores, which torch does not use by default. A device takes the first row whose words
# are all in its name.
_TFLOPS: list[tuple[set[str], float, float]] = [
    ({"GB200"}, 2500, 80),
    ({"B200"}, 2250, 75),
    ({"GH200"}, 989, 67),
    ({"H200", "NVL"}, 835, 60),
    ({"H200"}, 989, 67),
    ({"H100", "NVL"}, 835, 60),
    ({"H100", "PCIE"}, 756, 51),
    ({"H100"}, 989, 67),
    ({"A100"}, 312, 19.5),
    ({"A40"}, 149.7, 37.4),
    ({"A30"}, 165, 10.3),
    ({"A10"}, 125, 31.2),
    ({"L40S"}, 362, 91.6),
    ({"L40"}, 181, 90.5),
    ({"L4"}, 121, 30.3),
    ({"RTX", "A6000"}, 154.8, 38.7),
    ({"RTX", "6000", "ADA"}, 364.2, 91.1),
    ({"RTX", "5090"}, 209.5, 104.8),
    ({"RTX", "4090"}, 165.2, 82.6),
    ({"RTX", "3090"}, 71, 35.6),
    # No bfloat16 in hardware.
    ({"V100", "PCIE"}, 112, 14),
    ({"V100"}, 125, 15.7),
    ({"T4"}, 65, 8.1),
]
_WITHOUT_BFLOAT16 = {"V100", "T4"}
# In float8 with accumulation in float32, their data sheets name twice the rate of bfloat16; the others have no float8.
_WITH_FLOAT8 = {"GB200", "B200", "GH200", "H200", "H100", "L40S", "L40", "L4", "5090", "4090"}
# Constants of glibc's <malloc.h>. Setting the first one also stops glibc from raising that threshold.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_ARENA_MAX = -3, -1, -8
_RETURNED_BYTES = 128 * 1024
# Words of partial devices, and of slower ones with the name of a faster one: no number is better than a wrong one.
_OTHER_DEVICES = {"MIG", "LAPTOP", "MAX", "TI", "D"}


def device_name(device: torch.device) -> str:
    """The name of a GPU, or `CPU`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def refuse_unsupported_gpu(device: torch.device) -> None:
    """Refuse a GPU for which torch was built without kernels: its first operation would end with "no kernel image".

    Raises:
        UserError: with what torch was built for.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return
    built_for = torch.cuda.get_arch_list()
    major, minor = torch.cuda.get_device_capability(device)
    if built_for and not any(_runs_on(10 * major + minor, code) for code in built_for):
        raise UserError(
            f"torch {torch.__version__} has no kernels for {torch.cuda.get_device_name(device)} (compute capability "
            f"{major}.{minor}), but for {', '.join(built_for)}: install a torch that was built for a CUDA which "
            "supports this GPU, such as 12.6 for a V100, or take a newer GPU."
        )


def _runs_on(capability: int, code: str) -> bool:
    """Whether code such as `sm_86` runs on a GPU: machine code within one generation, PTX (`compute_90`) on later ones.

    https://docs.nvidia.com/cuda/cuda-c-programming-guide/#compatibility
    """
    kind, _, number = code.partition("_")
    built_for = int(re.sub(r"\D", "", number))
    return built_for <= capability and (kind == "compute" or built_for // 10 == capability // 10)


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy of values on the CPU, which the host does not wait for."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def known_peak_flops(device_name: str, precision: str) -> float | None:
    """Dense operations per second of a device by its CUDA name; None if unknown, or if it has none in `float8`."""
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    found = next((row for row in _TFLOPS if row[0] <= words), None)
    if found is None or words & _OTHER_DEVICES or (precision == "bfloat16" and found[0] & _WITHOUT_BFLOAT16):
        return None
    _, half, single = found
    if precision == "float8":
        return 2e12 * half if found[0] & _WITH_FLOAT8 else None
    return 1e12 * (single if precision == "float32" else half)


def peak_flops(device: torch.device, precision: str, configured_tflops: float | None) -> float | None:
    """Peak operations per second, the denominator of model FLOPs utilisation; None if unknown."""
    if configured_tflops is not None:
        return 1e12 * configured_tflops
    return known_peak_flops(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process so far: of tensors on a GPU, resident memory on a CPU; 0 if it cannot be read."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def free_memory_bytes(device: torch.device, num_sharing: int) -> int:
    """Memory that this process may still allocate: on its GPU, or its fraction of host memory.

    Args:
        device: the process's device.
        num_sharing: number of processes that share the host's memory; does nothing on a GPU.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # Memory that torch has reserved but not allocated is free too.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_available_on_host(), _available_in_cgroup()) // num_sharing


def return_freed_memory() -> None:
    """Make this process return large blocks of memory to the system as soon as they are freed.

    glibc keeps freed blocks below a threshold, which grows up to 32 MB, in up to eight heaps per core. A process that
    passes such buffers between threads then holds two or three times the memory it uses. Without glibc this does
    nothing.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _RETURNED_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _RETURNED_BYTES)
        libc.mallopt(_M_ARENA_MAX, 1)


def return_unused_pinned_memory() -> None:
    """Return blocks of pinned memory that torch keeps, but no tensor uses, to the system."""
    if hasattr(torch.accelerator, "empty_host_cache"):
        torch.accelerator.empty_host_cache()
    elif hasattr(torch._C, "_host_emptyCache"):
        torch._C._host_emptyCache()


def _available_on_host() -> int:
    meminfo = Path("/proc/meminfo").read_text(encoding="utf-8")
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo, re.MULTILINE)
    assert found is not None, "Linux reports MemAvailable since 2014"
    return 1024 * int(found[1])


def _available_in_cgroup() -> int:
    """Memory left below a container's limit; page cache counts as free, because the kernel can reclaim it."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = int((folder / "memory.max").read_text(encoding="utf-8"))
        current = int((folder / "memory.current").read_text(encoding="utf-8"))
        statistics = (folder / "memory.stat").read_text(encoding="utf-8")
    except (OSError, ValueError):
        # No limit ("max"), or cgroup v1.
        return sys.maxsize
    pages = re.search(r"^inactive_file (\d+)$", statistics, re.MULTILINE)
    return limit - current + (int(pages[1]) if pages else 0)
