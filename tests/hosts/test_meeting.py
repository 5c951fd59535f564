"""Ranks of three hosts meet by every scheduler's variables and every launcher."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from network import ALL, NUM_HOSTS, Network
from schedulers import SCHEDULERS
from training_runs import deepspeed, ended_after, finished

from test_entrypoint import ENTRYPOINT, JOBSET, MEET, environment

BIN = Path(sys.executable).parent


def _jobset(host: int, _addresses: Sequence[str]) -> dict[str, str]:
    # `MASTER_ADDR` stands for the cluster's name service.
    return JOBSET | {"JOB_COMPLETION_INDEX": str(host), "MASTER_ADDR": "host-0"}


def _slurm(host: int, _addresses: Sequence[str]) -> dict[str, str]:
    return {"SLURM_NNODES": "3", "SLURM_NODEID": str(host), "SLURM_JOB_NODELIST": "host-[0-2]", "SLURM_JOB_ID": "7"}


def _by_hand(host: int, addresses: Sequence[str]) -> dict[str, str]:
    return {"NUM_NODES": str(len(addresses)), "NODE_RANK": str(host), "MASTER_ADDR": addresses[0]}


OF_SCHEDULERS = {"`NUM_NODES`, `NODE_RANK`": _by_hand, "JobSet": _jobset, "Slurm": _slurm, **SCHEDULERS}


def _meet(
    network: Network,
    folder: Path,
    command: Callable[[int], Sequence[str | Path]],
    variables: Callable[[int], dict[str, str]],
) -> str:
    """Start a command on every host, whose ranks must meet; returns the seconds that it took."""
    script = folder / "meet.py"
    script.write_text(MEET)
    programs = []
    for host in ALL:
        own = environment(script, SEEN_DIR=str(folder), **variables(host))
        programs.append(network.launch(host, command(host), own, folder, folder / f"log-{host}"))
    finished(programs)
    for rank in ALL:
        seen = json.loads((folder / f"rank-{rank}.json").read_text())
        assert (seen["rank"], seen["world_size"], seen["sum"]) == (rank, NUM_HOSTS, 6)
    return f"{ended_after(programs, programs[0].started_at):.0f}, imports included"


@pytest.mark.parametrize("scheduler", OF_SCHEDULERS)
def test_the_variables_of_each_scheduler(scheduler: str, network: Network, tmp_path: Path, record) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\nprintf 'host-0\\nhost-1\\nhost-2\\n'\n")
    scontrol.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), str(BIN), os.environ["PATH"]])
    seconds = _meet(
        network,
        tmp_path,
        lambda _host: [ENTRYPOINT, "--config", "c.yaml"],
        lambda host: OF_SCHEDULERS[scheduler](host, network.addresses) | {"PATH": path},
    )
    record(f"entrypoint with the variables of {scheduler}", "-", "three ranks meet", seconds)


def _deepspeed(network: Network, folder: Path, host: int) -> list[str | Path]:
    return deepspeed(network, host, folder / "hostfile")


def _torchrun(network: Network, _folder: Path, host: int) -> list[str | Path]:
    place = ["--nnodes=3", f"--node-rank={host}", f"--master-addr={network.names[0]}", "--nproc-per-node=1"]
    return [BIN / "torchrun", *place]


LAUNCHERS = {"deepspeed --hostfile --no_ssh": _deepspeed, "torchrun --nnodes 3": _torchrun}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers(launcher: str, network: Network, tmp_path: Path, record) -> None:
    def command(host: int) -> list[str | Path]:
        return [*LAUNCHERS[launcher](network, tmp_path, host), tmp_path / "meet.py", "--config", "c.yaml"]

    seconds = _meet(network, tmp_path, command, lambda _host: {})
    record(f"`{launcher}`", "-", "three ranks meet", seconds)
