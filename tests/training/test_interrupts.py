"""Ctrl-C in a terminal, which reaches launcher and ranks alike: the step is finished and saved, and that is said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runs import finish, free_port, kill_all, rows, run_config, start_program, write_config

LIMIT_SECONDS = 300
NUM_STEPS = 1000


def deepspeed(config: Path) -> list[str]:
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    return [launcher, "--num_accelerators=2", f"--master_port={free_port()}", "launch/train.py", f"--config={config}"]


def torchrun(config: Path) -> list[str]:
    launcher = str(Path(sys.executable).with_name("torchrun"))
    return [launcher, "--nproc_per_node=2", f"--master_port={free_port()}", "launch/train.py", f"--config={config}"]


def no_launcher(config: Path) -> list[str]:
    return [str(Path(sys.executable).with_name("voxtral-dist")), "train", f"--config={config}"]


def entrypoint(config: Path) -> list[str]:
    return ["docker/entrypoint", f"--config={config}"]


def start(command: list[str]) -> subprocess.Popen[str]:
    """As a terminal's foreground job: a process group of its own, in which nothing ignores Ctrl-C."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {"PROCS_PER_NODE": "2", "MASTER_PORT": str(free_port()), "PATH": path}
    return start_program(command, variables, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


# Exit codes as docs/exit_codes.md has them.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "code"), [(deepspeed, -signal.SIGINT), (torchrun, 1), (no_launcher, 75), (entrypoint, 1)]
)
def test_an_interrupt_loses_no_step_under_any_launcher(
    tiny_model: Path, shard_folder: Path, tmp_path: Path, launcher: Callable[[Path], list[str]], code: int
) -> None:
    config = run_config(
        tmp_path / "run",
        tiny_model,
        shard_folder,
        num_steps=NUM_STEPS,
        engine={"fsdp2": {}},
        checkpoint={"every_steps": NUM_STEPS},
        export={"layouts": []},
    )
    process = start(launcher(write_config(config)))
    try:
        deadline = time.monotonic() + LIMIT_SECONDS
        while len(rows(config.run_dir, "train")) < 3:
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        output = finish(process, LIMIT_SECONDS)
    finally:
        kill_all(process)
    last = rows(config.run_dir, "train")[-1]["step"]
    assert last < NUM_STEPS
    assert output.count("Stopping: the state is saved after this step. Ctrl-C again leaves without that.") == 1, output
    assert f"Stopped at step {last} by a signal: rerun the same command to resume." in output
    assert [row["step"] for row in rows(config.run_dir, "checkpoint")] == [last]
    assert (config.run_dir / "checkpoints" / f"step-{last:07d}" / "complete.json").is_file()
    assert process.returncode == code, output
