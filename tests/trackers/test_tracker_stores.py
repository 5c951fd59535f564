"""What the trackers' own local stores hold is what `metrics.jsonl` holds, also after a kill and a resume.

Their packages come from `make rivals`, because Trackio asks for an older Pillow than the pinned one. Those of the test
environment are found before them.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest
import yaml

from voxtral_dist.config import RunConfig, TrackerKind
from voxtral_dist.distributed.world import alone
from voxtral_dist.files import write_atomically
from voxtral_dist.trackers import processes
from voxtral_dist.trackers.processes import followed_by_trackers
from voxtral_dist.training.metrics_file import drop_rows_after, read_metrics, scalars_of

from runs import ROOT, finish, kill_all, rows, run_config, write_config

Series = dict[str, list[tuple[int, float]]]
# Of a file of W&B, as of LevelDB's log: blocks that hold whole records or parts of them.
_BLOCK_BYTES, _FIRST, _LAST = 32768, 2, 4
_PATHS = [*sys.path, *(str(path) for path in (ROOT / ".rivals" / "trackers").glob("lib/python*/site-packages"))]
_PACKAGES: dict[TrackerKind, tuple[str, ...]] = {
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
    "trackio": ("trackio",),
}


def _write(run_dir: Path, kind: str, step: int, **values: Any) -> None:
    with (run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")


def _evaluate(run_dir: Path, step: int, wer: float) -> None:
    folder = run_dir / "evaluations" / f"step-{step:07d}"
    folder.mkdir(parents=True)
    lines = [
        {"utterance_id": number, "key": f"k{number}", "reference": "a b", "hypothesis": "a", "duration_seconds": None}
        | {"word_substitutions": number, "word_deletions": 0, "word_insertions": 0, "word_reference_length": 2}
        for number in range(3)
    ]
    (folder / "dev.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _write(run_dir, "evaluation", step, name="dev", wer=wer, seconds=1.5)


def _rows_of_metrics(run_dir: Path) -> Series:
    series: Series = {}
    for row in read_metrics(run_dir / "metrics.jsonl"):
        for name, value in scalars_of(row).items():
            series.setdefault(name, []).append((row["step"], value))
    return series


def _sent_id(run_dir: Path, kind: str) -> str:
    run_id: str = json.loads((run_dir / "trackers" / f"{kind}.json").read_text())["run_id"]
    return run_id


def _records(path: Path) -> Iterator[bytes]:
    text = path.read_bytes()
    position, parts = 7, b""
    while position + 7 <= len(text):
        if _BLOCK_BYTES - position % _BLOCK_BYTES < 7:
            position += _BLOCK_BYTES - position % _BLOCK_BYTES
            continue
        _, length, kind = struct.unpack("<IHB", text[position : position + 7])
        parts = (b"" if kind <= _FIRST else parts) + text[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, _LAST):
            yield parts


def _of_wandb(run_dir: Path) -> tuple[Series, int]:
    """Numbers and tables of all offline parts of the run, in the order in which `wandb sync` sends them."""
    from wandb.proto import wandb_internal_pb2

    series: Series = {}
    num_tables, newest = 0, 0
    run_id = _sent_id(run_dir, "wandb")
    for path in sorted((run_dir / "trackers" / "wandb").glob(f"offline-run-*-{run_id}/run-*.wandb")):
        for text in _records(path):
            record = wandb_internal_pb2.Record.FromString(text)
            if not record.HasField("history"):
                continue
            items = record.history.item
            values = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
            assert values["_step"] > newest, "the service would drop it"
            newest = values["_step"]
            for name, value in values.items():
                if name.startswith("evaluation/dev/utterances"):
                    num_tables += value == "table-file"
                elif "/" in name:
                    series.setdefault(name, []).append((values["step"], value))
    return series, num_tables


def _of_mlflow(run_dir: Path) -> tuple[Series, int]:
    from mlflow import MlflowClient

    client = MlflowClient()
    run = client.get_run(_sent_id(run_dir, "mlflow"))
    written = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert run.data.params["model.path"] == written["model"]["path"]
    series = {
        name: [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    tables = client.list_artifacts(run.info.run_id, "evaluation/dev/utterances")
    assert run.info.status == "FINISHED"
    assert {one.path for one in client.list_artifacts(run.info.run_id, "report")} >= {"report/report.html"}
    return series, len(tables)


def _of_trackio(run_dir: Path) -> tuple[Series, int]:
    from trackio.sqlite_storage import SQLiteStorage

    series: Series = {}
    num_tables = 0
    for row in SQLiteStorage.get_logs("voxtral-dist", _sent_id(run_dir, "trackio")):
        for name, value in row.items():
            if isinstance(value, dict):
                num_tables += value["_type"] == "trackio.table"
            elif "/" in name:
                series.setdefault(name, []).append((row["step"], value))
    return series, num_tables


STORES: dict[TrackerKind, Callable[[Path], tuple[Series, int]]] = {
    "wandb": _of_wandb,
    "mlflow": _of_mlflow,
    "trackio": _of_trackio,
}


@pytest.fixture
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let processes that a test starts find the packages, and store what they send in its folder."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(_PATHS))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    # Artifacts of MLflow are stored below it.
    monkeypatch.chdir(tmp_path)


def _is_installed(kind: TrackerKind) -> bool:
    return all(PathFinder.find_spec(name, _PATHS) for name in _PACKAGES[kind])


def _read_back(kind: TrackerKind, run_dir: Path) -> tuple[Series, int]:
    """Numbers and tables, read by a process of its own: packages of trackers read variables when they are imported."""
    ended = subprocess.run([sys.executable, __file__, kind, str(run_dir)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"{ended.stderr}\n{_log(run_dir, kind)}"
    series, num_tables = json.loads(ended.stdout.splitlines()[-1])
    return {name: [(step, value) for step, value in values] for name, values in series.items()}, num_tables


@pytest.mark.slow
@pytest.mark.parametrize("kind", STORES)
def test_a_killed_and_resumed_run_is_one_run_with_the_numbers_of_metrics_jsonl(
    kind: TrackerKind, tmp_path: Path, stores: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not _is_installed(kind):
        pytest.skip("its packages are missing: run `make rivals`")
    monkeypatch.setattr(processes, "END_SECONDS", 300.0)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    write_atomically(run_dir / "config.yaml", "model: {path: m}\n")
    for step in range(1, 6):
        _write(run_dir, "train", step, loss=step / 3, step_seconds=0.5)
        if step == 3:
            _write(run_dir, "checkpoint", 3, seconds=1.0)
            _evaluate(run_dir, 3, 0.9)
    # The follower of a killed rank finds the end of its input, and the last rows after the checkpoint are lost.
    assert _follow_to_the_end(kind, run_dir) == 0, _log(run_dir, kind)
    drop_rows_after(run_dir / "metrics.jsonl", 3)
    said: list[str] = []
    with followed_by_trackers(run_dir, (kind,), alone(), said.append):
        for step in range(4, 9):
            _write(run_dir, "train", step, loss=10 + step / 3, step_seconds=0.25)
        _write(run_dir, "checkpoint", 8, seconds=1.0)
        _evaluate(run_dir, 8, 0.4)
        for name in ("report.html", "summary.json"):
            (run_dir / name).write_text("{}")
    assert said == [], _log(run_dir, kind)
    assert _read_back(kind, run_dir) == (_rows_of_metrics(run_dir), 2)


def _follow_to_the_end(kind: TrackerKind, run_dir: Path) -> int:
    command = [sys.executable, "-m", "voxtral_dist.trackers", kind, str(run_dir)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode


def _log(run_dir: Path, kind: str) -> str:
    return (run_dir / "trackers" / f"{kind}.log").read_text()


@pytest.mark.slow
def test_a_training_run_that_is_killed_and_resumed_is_one_run_of_each_tracker(
    tiny_model: Path, shard_folder: Path, tmp_path: Path, stores: None
) -> None:
    kinds = [kind for kind in STORES if _is_installed(kind)]
    if not kinds:
        pytest.skip("their packages are missing: run `make rivals`")
    config = run_config(
        tmp_path / "run",
        tiny_model,
        shard_folder,
        num_steps=16,
        stage=2,
        checkpoint={"every_steps": 3, "asynchronous": False},
        evaluation={"test_sets": {"dev": {"shards": str(shard_folder), "max_utterances": 3}}, "every_steps": 8},
        metrics={"trackers": kinds, "tensorboard": False},
    )
    first = _start(config)
    saved = config.run_dir / "checkpoints" / "step-0000003" / "complete.json"
    while first.poll() is None and not (saved.is_file() and rows(config.run_dir, "train")[-1]["step"] >= 5):
        time.sleep(0.01)
    kill_all(first)
    assert first.returncode == -signal.SIGKILL, first.communicate()[0]
    second = _start(config)
    output = finish(second)
    assert second.returncode == 0, output
    assert "Training from step" in output
    expected = _rows_of_metrics(config.run_dir)
    assert [step for step, _ in expected["train/loss"]] == list(range(1, 17))
    for kind in kinds:
        # What a slow machine has not sent within the half minute after the end.
        assert _follow_to_the_end(kind, config.run_dir) == 0, _log(config.run_dir, kind)
        series, num_tables = _read_back(kind, config.run_dir)
        assert series == expected, kind
        assert num_tables == len(expected["evaluation/dev/wer"]) == 3


def _start(config: RunConfig) -> subprocess.Popen[str]:
    """Start a run in the working folder; not by forking, because DeepSpeed imports trackers, which start threads."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "train.py"), f"--config={write_config(config)}"],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


if __name__ == "__main__":
    print(json.dumps(STORES[sys.argv[1]](Path(sys.argv[2]))))
