"""What this machine has, what is missing, and DeepSpeed's extensions built before a run waits for them."""

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
_BUILD = "from voxtral_dist.engine.zero.settings import build_extensions; build_extensions({}, {})"


def examine(build_timeout: int, with_offload: bool, with_nvme: bool) -> int:
    """Print a report; 0 if a run can start here, 2 if not."""
    for package in _PACKAGES:
        print(f"{package} {importlib.metadata.version(package)}")
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, {torch.cuda.device_count()} GPUs")
    if shutil.which("c++") is None or not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        print("DeepSpeed's extensions need a C++ compiler and Python.h (Debian: apt install g++ python3-dev).")
        return 2
    return _build(build_timeout, with_offload, with_nvme)


def _build(timeout: int, with_offload: bool, with_nvme: bool) -> int:
    """Build in a process group of its own, so that a build that takes too long is ended with its compilers."""
    for lock, age in old_locks():
        print(f"Removed the lock {lock}, {age / 60:.0f} minutes old, which a killed build had left behind.")
        lock.unlink(missing_ok=True)
    print(f"Building DeepSpeed's extensions (limit {timeout} s; cached afterwards) ...", flush=True)
    command = [sys.executable, "-c", _BUILD.format(with_offload, with_nvme)]
    # Another version of ninja would build everything again: use the one that a run in this environment finds.
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
        print(f"The build did not end within {timeout} s: raise --build-timeout, or look for what holds the machine.")
        return 2
    if builder.returncode != 0:
        print(f"The build failed:\n{output.decode(errors='replace')[-4000:]}")
        return 2
    print("DeepSpeed's extensions are ready.")
    return 0
