"""Runs the tests in `on_device` in a process that gets a CUDA device before it imports torch.

Look into a failure by the same command: `PYTHONPATH=tests/cuda pytest -p fake_cuda tests/cuda/on_device`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TIMEOUT_SECONDS = 400
HERE = Path(__file__).parent


@pytest.mark.skipif(shutil.which("g++") is None, reason="the device is a piece of C++, built by g++")
@pytest.mark.parametrize("marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_everything_on_a_device(tmp_path: Path, marked: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    options = ["-q", "-m", marked, "-p", "fake_cuda", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'device'}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(HERE / "on_device")],
        env=environment | {"PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
