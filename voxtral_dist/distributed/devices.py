"""What a rank's device can do at most, how much of its memory was in use, and how much is free."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

import torch

# Dense 10^12 operations per second by NVIDIA's data sheets: of bfloat16 and float16 with sums in float32, and of
# float32, for which torch leaves tensor cores aside. The first row counts whose words are all in a device's name.
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
    ({"RTX", "5090"}, 209.5, 104.8),
    ({"RTX", "4090"}, 165.2, 82.6),
    ({"RTX", "3090"}, 71, 35.6),
    # Without bfloat16 in hardware.
    ({"V100", "PCIE"}, 112, 14),
    ({"V100"}, 125, 15.7),
    ({"T4"}, 65, 8.1),
]
_WITHOUT_BFLOAT16 = {"V100", "T4"}
# Of glibc's <malloc.h>. Setting the first also ends its growth.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_ARENA_MAX = -3, -1, -8
_GIVEN_BACK_BYTES = 128 * 1024
# Parts of a device, and slower ones under the name of a faster: nothing is better than a wrong figure.
_OTHER_DEVICES = {"MIG", "LAPTOP", "MAX", "TI", "D"}


def known_peak_flops(device_name: str, precision: str) -> float | None:
    """Dense operations per second of a device by its name in CUDA; None where it is not known."""
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    found = next((row for row in _TFLOPS if row[0] <= words), None)
    if found is None or words & _OTHER_DEVICES or (precision == "bfloat16" and found[0] & _WITHOUT_BFLOAT16):
        return None
    _, half, single = found
    return 1e12 * (single if precision == "float32" else half)


def peak_flops(device: torch.device, precision: str, configured_tflops: float | None) -> float | None:
    """Operations per second that utilisation is measured against; None where they are not known."""
    if configured_tflops is not None:
        return 1e12 * configured_tflops
    return known_peak_flops(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process ever held: of tensors on a GPU, of resident memory on a CPU; 0 where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def free_memory_bytes(device: torch.device, num_sharing: int) -> int:
    """What this process may still take: of its GPU, or its part of the host's memory that so many processes share."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch keeps for later tensors is free too.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_available_on_host(), _available_in_cgroup()) // num_sharing


def return_freed_memory() -> None:
    """Let this process give large blocks of memory back as soon as they are freed.

    glibc keeps what is freed below a threshold that grows up to 32 MB, in up to eight heaps per core. A process that
    moves such buffers between threads then holds two or three times what it uses. Elsewhere than on glibc it does
    nothing.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for option, value in ((_M_MMAP_THRESHOLD, _GIVEN_BACK_BYTES), (_M_TRIM_THRESHOLD, _GIVEN_BACK_BYTES)):
            libc.mallopt(option, value)
        libc.mallopt(_M_ARENA_MAX, 1)


def _available_on_host() -> int:
    meminfo = Path("/proc/meminfo").read_text(encoding="utf-8")
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo, re.MULTILINE)
    assert found is not None, "Linux tells it since 2014"
    return 1024 * int(found[1])


def _available_in_cgroup() -> int:
    """What is left below the limit of a container; pages of files, which the kernel gives back, do not count."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = int((folder / "memory.max").read_text(encoding="utf-8"))
        current = int((folder / "memory.current").read_text(encoding="utf-8"))
        statistics = (folder / "memory.stat").read_text(encoding="utf-8")
    except (OSError, ValueError):
        # No limit ("max"), or an older kind of cgroup.
        return sys.maxsize
    pages = re.search(r"^inactive_file (\d+)$", statistics, re.MULTILINE)
    return limit - current + (int(pages[1]) if pages else 0)
