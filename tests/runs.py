"""Configurations of small runs, and the commands by which users start them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from voxtral_dist.config import RunConfig, dump_config
from voxtral_dist.training.metrics_file import read_metrics

from ranks import Ended, run_programs

TIMEOUT_SECONDS = 240
ROOT = Path(__file__).resolve().parents[1]


def run_config(
    run_dir: Path,
    model: Path,
    shards: Path,
    *,
    num_steps: int,
    slots_per_step: int = 4,
    stage: int = 3,
    **sections: Any,
) -> RunConfig:
    """A float32 run with small micro-batches of uneven lengths."""
    return RunConfig.model_validate(
        {
            "run_dir": run_dir,
            "num_steps": num_steps,
            "model": {"path": str(model), "precision": "float32"},
            "train_data": {
                "shards": [str(shards)],
                "slots_per_step": slots_per_step,
                "max_examples": 2,
                "megabatch_steps": 4,
                "num_workers": 0,
            },
            # A larger epsilon: Adam divides by it where gradients vanish, which would amplify rounding errors.
            "optimizer": {"learning_rate": 2e-3, "warmup_steps": 2, "epsilon": 1e-5},
            "engine": {"deepspeed": ROOT / "ds_configs" / f"zero{stage}.json"},
        }
        | sections
    )


def train_as_users_do(config: RunConfig, world_size: int, *overrides: str) -> Ended:
    """Run `launch/train.py`'s program on ranks that are forked, which is much faster than by a launcher.

    No launcher ends the others where one of them fails. Options may be among the overrides.
    """
    words = [word for one in overrides for word in ((one,) if one.startswith("--") else ("--set", one))]
    arguments = ["train", f"--config={write_config(config)}", *words]
    ended = run_programs(world_size, _run_command, arguments, free_port(), limit_seconds=TIMEOUT_SECONDS)
    return Ended(max(one.code for one in ended), "".join(one.output for one in ended))


def _run_command(rank: int, arguments: list[str], port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from voxtral_dist.cli.main import console

    console(arguments)


def launch(config: RunConfig, world_size: int, *overrides: str) -> subprocess.Popen[str]:
    """Start a run by DeepSpeed's command, as the leader of a new process group."""
    launcher = [str(Path(sys.executable).with_name("deepspeed")), f"--num_accelerators={world_size}"]
    return _start([*launcher, f"--master_port={free_port()}", "launch/train.py"], config, overrides, {})


def launch_by_torchrun(config: RunConfig, world_size: int, variables: dict[str, str]) -> subprocess.Popen[str]:
    """Start a run by torchrun."""
    launcher = [str(Path(sys.executable).with_name("torchrun")), f"--nproc_per_node={world_size}"]
    return _start([*launcher, f"--master_port={free_port()}", "launch/train.py"], config, (), variables)


def launch_by_entrypoint(config: RunConfig, world_size: int) -> subprocess.Popen[str]:
    """Start a run by the entrypoint of containers and schedulers."""
    variables = {"PROCS_PER_NODE": str(world_size), "MASTER_PORT": str(free_port())}
    return _start(["docker/entrypoint"], config, (), variables)


def finish(process: subprocess.Popen[str], timeout_seconds: float = TIMEOUT_SECONDS) -> str:
    """Wait for a run; return the output of the launcher and its ranks."""
    try:
        output, _ = process.communicate(timeout=timeout_seconds)
    finally:
        kill_all(process)
    return output


def kill_all(process: subprocess.Popen[str]) -> None:
    """Kill the launcher and its ranks at once, like a node that loses power."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def scalars_of(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars that TensorBoard shows for a run: (step, value) by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def _start(
    command: list[str], config: RunConfig, overrides: tuple[str, ...], variables: dict[str, str]
) -> subprocess.Popen[str]:
    words = [word for override in overrides for word in ("--set", override)]
    return start_program([*command, f"--config={write_config(config)}", *words], variables)


def start_program(command: list[str], variables: dict[str, str], **options: Any) -> subprocess.Popen[str]:
    """Start a command in the repository and in a session of its own, with all its output in one pipe."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        **options,
    )


def rows(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The metrics of one kind that a run has written so far."""
    path = run_dir / "metrics.jsonl"
    return [row for row in read_metrics(path) if row["kind"] == kind] if path.exists() else []


def write_config(config: RunConfig) -> Path:
    """Write a configuration beside the folder of its run."""
    path = config.run_dir.with_suffix(".yaml")
    path.write_text(dump_config(config), encoding="utf-8")
    return path


def free_port() -> int:
    """A port that nobody uses."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
