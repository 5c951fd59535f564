"""What Prometheus scrapes during a run is what `metrics.jsonl` records, and the dashboard asks for nothing else."""

from __future__ import annotations

import json
import re
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from voxtral_dist.config import RunConfig
from voxtral_dist.distributed.world import World, alone
from voxtral_dist.errors import RankError, UserError
from voxtral_dist.train import train
from voxtral_dist.training import metrics_endpoint
from voxtral_dist.training.metrics_endpoint import GAUGES, STEP_GAUGES, served_metrics
from voxtral_dist.training.metrics_file import read_metrics
from voxtral_dist.training.metrics_log import MetricsLog

from ranks import run_ranks
from runs import ROOT, free_port, run_config

DASHBOARD = ROOT / "launch" / "kubernetes" / "dashboard.json"


def _get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def _scrape(port: int) -> dict[str, float]:
    lines = _get(port, "/metrics")[1].splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")}


def _train_and_scrape(world: World, config: RunConfig) -> list[tuple[int, dict[str, float]]]:
    """The answers to a probe and to a scrape after each step."""
    port = config.metrics.prometheus_port
    assert port is not None
    found = []
    record = MetricsLog.train_step

    def record_and_scrape(log: MetricsLog, *arguments: Any) -> None:
        record(log, *arguments)
        found.append((_get(port, "/alive")[0], _scrape(port)))

    MetricsLog.train_step = record_and_scrape
    assert train(config, world) == 0
    with pytest.raises(OSError, match="refused"):
        _get(port, "/metrics")
    return found


def test_a_scrape_has_the_newest_step(tiny_model: Path, shard_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    config = run_config(
        tmp_path / "run",
        tiny_model,
        shard_folder,
        num_steps=3,
        stage=2,
        checkpoint={"every_steps": 2, "asynchronous": False},
        metrics={"prometheus_port": free_port(), "tensorboard": False, "peak_tflops": 0.1},
    )
    before = time.time()
    (scraped,) = run_ranks(1, _train_and_scrape, config)
    rows = [row for row in read_metrics(config.run_dir / "metrics.jsonl") if row["kind"] == "train"]
    assert [code for code, _ in scraped] == [200] * 3
    for row, (_, values) in zip(rows, scraped, strict=True):
        assert (values["voxtral_step"], values["voxtral_num_steps"]) == (row["step"], 3)
        assert values["voxtral_loss_nats"] == row["loss"]
        assert values["voxtral_peak_memory_bytes"] == row["memory_gigabytes"] * 1e9
        assert values["voxtral_model_flops_utilization"] == row["model_flops_utilization"]
        assert set(values) >= set(STEP_GAUGES)
        assert before < values["voxtral_newest_step_timestamp_seconds"] <= values["voxtral_heartbeat_timestamp_seconds"]
    assert ["voxtral_checkpoint_step" in values for _, values in scraped] == [False, False, True]
    assert scraped[2][1]["voxtral_checkpoint_step"] == 2
    assert set(scraped[2][1]) == set(GAUGES)


def test_a_probe_fails_once_nothing_is_heard_of_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prometheus_client")
    port = free_port()
    with served_metrics(port, 600.0, alone()):
        assert _get(port, "/alive")[0] == 200
        monkeypatch.setattr(metrics_endpoint, "heard_seconds_ago", lambda: 601.0)
        assert _get(port, "/alive")[0] == 503


def test_a_port_in_use_is_refused() -> None:
    pytest.importorskip("prometheus_client")
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RankError, match=f"cannot serve on port {port}: address already in use"):
            served_metrics(port, 600.0, alone()).__enter__()


def test_a_missing_package_is_refused_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_endpoint, "find_spec", lambda _name: None)
    second = World(1, 2, 1, torch.device("cpu"))
    for world in (alone(), second):
        with pytest.raises(UserError, match="pip install 'voxtral-dist\\[prometheus\\]'"):
            served_metrics(9400, 600.0, world).__enter__()
        with served_metrics(None, 600.0, world) as endpoint:
            assert endpoint is None


def test_the_dashboard_asks_for_metrics_that_exist_and_for_all_of_them() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"voxtral_\w+", query)}
    assert asked == set(GAUGES)
    assert re.findall(r"voxtral_\w+", json.dumps(dashboard["templating"])) == ["voxtral_step"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
