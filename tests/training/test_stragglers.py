"""A slow rank is named, whatever the others wait for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from voxtral_dist.distributed.world import World
from voxtral_dist.training import stragglers
from voxtral_dist.training.metrics_file import read_metrics
from voxtral_dist.training.metrics_log import MetricsLog
from voxtral_dist.training.stragglers import Stragglers

from ranks import run_ranks


def measured(
    world: World, run_dir: Path, seconds: dict[str, list[list[float]]], waiting: list[float]
) -> list[dict[str, Any]]:
    """The events of 50 steps for each check, in which each rank measures its seconds, by measure and check."""
    checks = iter(zip(seconds["device"], seconds["cpu"], strict=True))
    coming: list[float] = []

    def fastest(_function: object) -> float:
        if not coming:
            coming.extend(of_ranks[world.rank] for of_ranks in next(checks))
        return coming.pop(0)

    stragglers._fastest = fastest
    now = iter(range(0, 10_000, 100))
    with MetricsLog(run_dir, 999, 0, world) as log:
        watch = Stragglers(log, world, f"host-{world.rank}", clock=lambda: float(next(now)))
        for step in range(1, 50 * len(seconds["cpu"]) + 1):
            watch.after_step(step, waiting[world.rank])
    return [row for row in read_metrics(run_dir / "metrics.jsonl") if row["kind"] == "event"]


EVEN = [[1.0, 1.0, 1.1]] * 6


def sentences(rows: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [(row["step"], row["sentence"]) for row in rows if row["event"] == "straggler"]


@pytest.mark.parametrize("key", ["device", "cpu"])
def test_a_rank_that_computes_slowly_is_named_once(tmp_path: Path, key: str) -> None:
    seconds = {"device": EVEN, "cpu": EVEN} | {key: [[1.0, 1.0, 2.0]] * 5 + [[1.0, 1.0, 1.0]]}
    rows = run_ranks(3, measured, tmp_path, seconds, [0.0, 0.0, 0.0])[0]
    ((step, sentence),) = sentences(rows)
    assert step == 150
    named = {"device": "its device computes", "cpu": "its CPU computes"}[key]
    assert sentence == (
        f"Rank 2 on host-2 is slow: {named} for 2.0 times the median of all 3 ranks (2 s against 1 s), and all others "
        "wait for it."
    )
    first = next(row for row in rows if row["event"] == "ranks")
    assert (first["step"], first[key]) == (50, {"median_seconds": 1.0, "slowest_seconds": 2.0, "slowest_rank": 2})


def test_hiccups_and_changing_ranks_are_not_named(tmp_path: Path) -> None:
    hiccups = [[1.0, 1.0, 5.0], [1.0, 5.0, 1.0], *2 * [[5.0, 1.0, 1.0]], [1.0, 1.0, 1.0], [5.0, 1.0, 1.0]]
    rows = run_ranks(3, measured, tmp_path, {"device": hiccups, "cpu": EVEN}, [0.0, 0.0, 0.0])[0]
    assert not sentences(rows)


@pytest.mark.parametrize(("waiting", "is_named"), [([0.0, 0.2, 0.0], True), ([0.001, 0.01, 0.001], False)])
def test_a_rank_whose_data_is_late_is_named_where_that_matters(
    tmp_path: Path, waiting: list[float], is_named: bool
) -> None:
    rows = run_ranks(3, measured, tmp_path, {"device": EVEN, "cpu": EVEN}, waiting)[0]
    named = sentences(rows)
    assert len(named) == is_named
    if is_named:
        assert "Rank 1 on host-1 is slow: it waits for data for much more than the median" in named[0][1]


def test_what_is_measured_takes_time() -> None:
    assert stragglers._fastest(stragglers._loop) > 0
