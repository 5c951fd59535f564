"""A report on this machine, and the build of DeepSpeed's extensions before a run has to wait for it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

from voxtral_dist.engine.zero.extensions import extension_locks, old_locks

_PACKAGES = ("torch", "deepspeed", "transformers", "mistral-common", "webdataset", "soundfile", "jiwer")
_BUILD = "from voxtral_dist.engine.zero.extensions import build_extensions; build_extensions({}, {})"


def examine(build_timeout: int, with_offload: bool, with_nvme: bool) -> int:
    """Print versions and hardware, and build DeepSpeed's extensions.

    Args:
        build_timeout: limit for the build, in seconds.
        with_offload: build the extension for offloading the optimizer too.
        with_nvme: build the extensions for offloading to NVMe too.

    Returns:
        The exit code: 0 if runs can start on this machine, else 2.
    """
    for package in _PACKAGES:
        print(f"{package} {importlib.metadata.version(package)}")
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, {torch.cuda.device_count()} GPUs")
    if shutil.which("c++") is None or not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        print("DeepSpeed's extensions need a C++ compiler and Python.h (Debian: apt install g++ python3-dev).")
        return 2
    return _build(build_timeout, with_offload, with_nvme)


def _build(timeout: int, with_offload: bool, with_nvme: bool) -> int:
    """Build in a separate process group, so that a timeout ends the compilers too."""
    for lock, age in old_locks():
        print(f"Removed the lock {lock}, {age / 60:.0f} minutes old, which a killed build left behind.")
        lock.unlink(missing_ok=True)
    print(f"Building DeepSpeed's extensions (limit {timeout} s; cached afterwards) ...", flush=True)
    command = [sys.executable, "-c", _BUILD.format(with_offload, with_nvme)]
    # Use the ninja that runs in this environment find: another version would rebuild everything.
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    builder = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        output, _ = builder.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(builder.pid, signal.SIGKILL)
        for lock in extension_locks():
            lock.unlink(missing_ok=True)
        print(f"The build took longer than {timeout} s: raise --build-timeout, or look for what slows this machine.")
        return 2
    if builder.returncode != 0:
        print(f"The build failed:\n{output.decode(errors='replace')[-4000:]}")
        return 2
    print("DeepSpeed's extensions are ready.")
    return 0
