"""A process learns its rank from its launcher, never works alone by mistake, and ends with its launcher."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from voxtral_dist.distributed.launchers import adopt_launched_place
from voxtral_dist.errors import UserError

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the environment without a place."""
    kept = {name: value for name, value in os.environ.items() if name not in (*PLACE, "MASTER_ADDR")}
    monkeypatch.setattr(os, "environ", kept)


def test_ranks_of_open_mpi() -> None:
    os.environ.update(OPEN_MPI, MASTER_ADDR="first")
    adopt_launched_place()
    assert [os.environ[name] for name in PLACE] == ["5", "8", "1", "4"]


def test_several_hosts_of_open_mpi_need_an_address() -> None:
    os.environ.update(OPEN_MPI)
    with pytest.raises(UserError, match="add `-x MASTER_ADDR=HOST` to mpirun"):
        adopt_launched_place()
    os.environ["OMPI_COMM_WORLD_LOCAL_SIZE"] = "8"
    adopt_launched_place()
    assert os.environ["RANK"] == "5"


def test_a_launcher_of_ranks_comes_first() -> None:
    os.environ.update(OPEN_MPI, RANK="0", WORLD_SIZE="1")
    adopt_launched_place()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1")


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "PMI_SIZE", "PET_NNODES", "SKYPILOT_NUM_NODES"])
def test_several_processes_without_ranks_are_refused(name: str) -> None:
    os.environ[name] = "1"
    adopt_launched_place()
    os.environ[name] = "2"
    with pytest.raises(UserError, match=f"{name} is '2', but this process has no RANK"):
        adopt_launched_place()
    os.environ["WORLD_SIZE"] = "1"
    adopt_launched_place()


# A rank, without torch: it says so when it is asked to stop.
RANK = """
import os, signal, sys, time
from voxtral_dist.distributed import launchers

def stop(*_):
    open(sys.argv[1] + "/stopped", "w").close()
    os._exit(75)

signal.signal(signal.SIGTERM, stop)
launchers._POLL_SECONDS = 0.05
launchers.watch_launcher()
open(sys.argv[1] + "/started", "w").close()
time.sleep(60)
"""
LAUNCHER = """
import subprocess, sys
sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))
"""


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not come"
        time.sleep(0.02)


@pytest.mark.parametrize("launchers", [1, 2], ids=["its launcher", "the command deepspeed"])
def test_a_rank_saves_and_ends_when_its_launcher_is_killed(launchers: int, tmp_path: Path) -> None:
    """`deepspeed` starts `deepspeed.launcher.launch`, which starts ranks; names and parents are what counts."""
    rank, launcher, command = tmp_path / "rank.py", tmp_path / "deepspeed.launcher.launch", tmp_path / "deepspeed"
    rank.write_text(RANK)
    launcher.write_text(LAUNCHER)
    command.write_text(LAUNCHER)
    chain = [str(command), str(launcher)][-launchers:]
    variables = os.environ | {"RANK": "0", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    started = subprocess.Popen([sys.executable, *chain, str(rank), str(tmp_path)], env=variables)
    try:
        _wait_for(tmp_path / "started")
        time.sleep(0.3)
        assert not (tmp_path / "stopped").exists()
    finally:
        started.kill()
        started.wait()
    _wait_for(tmp_path / "stopped")
