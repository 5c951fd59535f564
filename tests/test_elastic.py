"""A rank or a node is lost or leaves, and the run goes on with what is left, on the same curve."""

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from voxtral_dist.config import RunConfig

from runs import ROOT, free_port, kill_all, rows, run_config, train_as_users_do, write_config
from test_entrypoint import ENTRYPOINT, environment

LIMIT_SECONDS = 400
NUM_STEPS = 40


def start(config: Path, rank: int, port: int, output: Path) -> subprocess.Popen[str]:
    variables = {"NUM_NODES": "1:2", "NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with output.open("w") as file:
        return subprocess.Popen(
            [str(ENTRYPOINT), "--config", str(config)],
            env=environment(ROOT / "launch" / "train.py", LOCAL_ADDR="127.0.0.1", **variables),
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            cwd=ROOT,
        )


SECTIONS: dict[str, Any] = {
    "engine": {"fsdp2": {}},
    "checkpoint": {"every_steps": 3},
    "export": {"layouts": []},
    "distributed": {"timeout_seconds": 30},
}


@pytest.fixture(scope="module")
def losses(tiny_model: Path, shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    whole = run_config(folder / "run", tiny_model, shard_folder, num_steps=NUM_STEPS, **SECTIONS)
    assert train_as_users_do(whole, 1).code == 0
    return [row["loss"] for row in rows(whole.run_dir, "train")]


@pytest.fixture
def config(tiny_model: Path, shard_folder: Path, tmp_path: Path) -> RunConfig:
    return run_config(tmp_path / "run", tiny_model, shard_folder, num_steps=NUM_STEPS, **SECTIONS)


@pytest.fixture
def nodes(config: RunConfig, tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Two nodes of one run."""
    path, port = write_config(config), free_port()
    running = [start(path, rank, port, tmp_path / f"node-{rank}.txt") for rank in range(2)]
    yield running
    for node in running:
        kill_all(node)


def wait_for(what: Callable[[], bool], tmp_path: Path) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not what():
        assert time.monotonic() < deadline, "".join(path.read_text() for path in sorted(tmp_path.glob("node-*.txt")))
        time.sleep(0.1)


def worlds(config: RunConfig) -> list[int]:
    """The number of ranks at each start."""
    return [row["world_size"] for row in rows(config.run_dir, "event") if row["event"] in ("started", "resumed")]


@pytest.mark.slow
def test_a_run_goes_on_with_the_nodes_that_are_left(losses, config, nodes, tmp_path):
    wait_for(lambda: len(rows(config.run_dir, "train")) >= 8, tmp_path)
    nodes[1].send_signal(signal.SIGTERM)
    assert nodes[1].wait(timeout=LIMIT_SECONDS) == 75, (tmp_path / "node-1.txt").read_text()
    assert nodes[0].wait(timeout=LIMIT_SECONDS) == 0, (tmp_path / "node-0.txt").read_text()
    assert worlds(config) == [2, 1]
    assert [row["loss"] for row in rows(config.run_dir, "train")] == pytest.approx(losses, rel=1e-5)


def rank_of(node: subprocess.Popen[str]) -> psutil.Process:
    """The process of a node's rank."""
    (found,) = [one for one in psutil.Process(node.pid).children(recursive=True) if "LOCAL_RANK" in one.environ()]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("killed", "lost"), [(0, "agent"), (1, "node")])
def test_a_killed_rank_is_started_again_and_a_lost_node_is_done_without(losses, config, nodes, tmp_path, killed, lost):
    wait_for(lambda: len(rows(config.run_dir, "train")) >= 8, tmp_path)
    rank_of(nodes[killed]).kill()
    wait_for(lambda: len(worlds(config)) == 2, tmp_path)
    wait_for(lambda: rows(config.run_dir, "train")[-1]["step"] >= 12, tmp_path)
    # The other node is that of MASTER_ADDR, the meeting point. torchrun's ranks have process groups of their own.
    rank = rank_of(nodes[1])
    kill_all(nodes[1])
    if lost == "node":
        rank.kill()
    assert nodes[0].wait(timeout=LIMIT_SECONDS) == 0, (tmp_path / "node-0.txt").read_text()
    assert worlds(config) == [2, 2, 1]
    assert [row["loss"] for row in rows(config.run_dir, "train")] == pytest.approx(losses, rel=1e-5)
