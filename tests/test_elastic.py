"""A node leaves a run, and the other one goes on with the same curve."""

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from voxtral_dist.training.metrics_file import read_metrics

from runs import ROOT, free_port, kill_all, run_config, train_as_users_do, write_config
from test_entrypoint import ENTRYPOINT, environment

LIMIT_SECONDS = 400
NUM_STEPS = 40


def rows(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    return [row for row in read_metrics(path) if row["kind"] == kind] if path.exists() else []


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


@pytest.mark.slow
def test_a_run_goes_on_with_the_nodes_that_are_left(tiny_model, shard_folder, tmp_path):
    sections: dict[str, Any] = {
        "engine": {"fsdp2": {}},
        "checkpoint": {"every_steps": 3},
        "export": {"layouts": []},
        "distributed": {"timeout_seconds": 30},
    }
    whole = run_config(tmp_path / "whole", tiny_model, shard_folder, num_steps=NUM_STEPS, **sections)
    assert train_as_users_do(whole, 1).code == 0
    config = run_config(tmp_path / "elastic", tiny_model, shard_folder, num_steps=NUM_STEPS, **sections)
    path, port = write_config(config), free_port()
    nodes = [start(path, rank, port, tmp_path / f"node-{rank}.txt") for rank in range(2)]
    try:
        deadline = time.monotonic() + LIMIT_SECONDS
        while len(rows(config.run_dir, "train")) < 8:
            assert time.monotonic() < deadline, (tmp_path / "node-0.txt").read_text()
            time.sleep(0.1)
        nodes[1].send_signal(signal.SIGTERM)
        assert nodes[1].wait(timeout=LIMIT_SECONDS) == 75, (tmp_path / "node-1.txt").read_text()
        assert nodes[0].wait(timeout=LIMIT_SECONDS) == 0, (tmp_path / "node-0.txt").read_text()
    finally:
        for node in nodes:
            kill_all(node)
    worlds = [row["world_size"] for row in rows(config.run_dir, "event") if row["event"] in ("started", "resumed")]
    assert worlds == [2, 1]
    losses, expected = ([row["loss"] for row in rows(run, "train")] for run in (config.run_dir, whole.run_dir))
    assert losses == pytest.approx(expected, rel=1e-5)
