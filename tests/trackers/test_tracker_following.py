"""A tracker gets the numbers of `metrics.jsonl`, each step once, whatever happens to the run or to the tracker."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from voxtral_dist.distributed.world import World, alone
from voxtral_dist.errors import UserError
from voxtral_dist.trackers import following, processes
from voxtral_dist.trackers.following import Follower
from voxtral_dist.trackers.processes import followed_by_trackers, refuse_missing_trackers
from voxtral_dist.trackers.tracker import TrackedRow
from voxtral_dist.training.metrics_file import drop_rows_after, read_metrics, scalars_of


class Store:
    """A tracker that keeps what it gets, and fails as often as it is told."""

    def __init__(self) -> None:
        self.runs: dict[str, list[TrackedRow]] = {}
        self.config: Mapping[str, Any] = {}
        self.files: list[str] = []
        self.failures_left = 0
        self._run_id = ""

    def open(self, run_id: str | None, name: str, folder: Path, config: Mapping[str, Any]) -> str:
        self._run_id = run_id or f"{name}-{len(self.runs)}"
        self.runs.setdefault(self._run_id, [])
        self.config = config
        return self._run_id

    def send(self, rows: Sequence[TrackedRow]) -> None:
        if self.failures_left:
            self.failures_left -= 1
            # Half of it has arrived.
            self._take(rows[: len(rows) // 2])
            raise ConnectionError("the service is down")
        self._take(rows)

    def _take(self, rows: Sequence[TrackedRow]) -> None:
        known = {(row.number, row.time) for row in self.runs[self._run_id]}
        self.runs[self._run_id] += [row for row in rows if (row.number, row.time) not in known]

    def send_files(self, files: Mapping[str, Path]) -> None:
        self.files += files

    def close(self, *, is_finished: bool) -> None:
        pass


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store()
    monkeypatch.setattr(following, "_TRACKERS", {"trackio": lambda: store})
    monkeypatch.setattr(following, "_POLL_SECONDS", 0.0)
    return store


def write(run_dir: Path, kind: str, step: int, **values: Any) -> None:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").write_text("model: {path: m}\nstorage: {token: hf_abcdefghijklmnopqrstuv}\n")
    with (run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")


def train_steps(run_dir: Path, first: int, last: int, loss: float) -> None:
    for step in range(first, last + 1):
        write(run_dir, "train", step, loss=loss + step / 3, step_seconds=0.5, grad_norm=None)


def expected(run_dir: Path) -> list[tuple[int, dict[str, float]]]:
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [(row["step"], scalars_of(row)) for row in rows if row["kind"] in ("train", "evaluation")]


def _got(rows: Sequence[TrackedRow]) -> list[tuple[int, dict[str, float]]]:
    return [(row.step, dict(row.scalars)) for row in rows]


def _follow(run_dir: Path, *while_running: Callable[[], object]) -> tuple[bool, list[str]]:
    """Follow a run in which these things happen one after the other; the last attempt comes after all of them."""
    said: list[str] = []
    events = iter(while_running)

    def wait(_seconds: float) -> bool:
        event = next(events, None)
        if event is not None:
            event()
        return event is None

    return Follower(run_dir, "trackio", said.append).follow(wait), said


def test_steps_come_once_they_last_and_once_after_a_kill_and_a_resume(tmp_path: Path, store: Store) -> None:
    run = tmp_path / "run"
    write(run, "evaluation", 0, name="dev", wer=1.5, seconds=2.0)
    train_steps(run, 1, 5, loss=0.0)
    assert _follow(run) == (True, [])
    assert store.runs == {"run-0": []}
    write(run, "checkpoint", 3, seconds=1.0)
    train_steps(run, 6, 6, loss=0.0)
    assert _follow(run)[0]
    assert [row.step for row in store.runs["run-0"]] == [0, 1, 2, 3]
    # Killed after step 6, and resumed with other results.
    drop_rows_after(run / "metrics.jsonl", 3)
    train_steps(run, 4, 9, loss=10.0)
    write(run, "evaluation", 9, name="dev", wer=0.5, seconds=2.0)
    write(run, "checkpoint", 9, seconds=1.0)
    assert _follow(run, lambda: None) == (True, [])
    assert list(store.runs) == ["run-0"]
    assert _got(store.runs["run-0"]) == expected(run)
    assert [row.number for row in store.runs["run-0"]] == list(range(1, 12))
    # Sent at once, step 4 would have begun before what was sent earlier.
    times = [row.time for row in store.runs["run-0"]]
    assert times == sorted(times)


def test_a_service_that_is_down_gets_everything_later(tmp_path: Path, store: Store) -> None:
    run = tmp_path / "run"
    train_steps(run, 1, 6, loss=0.0)
    write(run, "checkpoint", 6)
    store.failures_left = 1000
    has_all, said = _follow(run, lambda: None, lambda: None)
    assert not has_all
    assert len(said) == 1
    assert "ConnectionError: the service is down" in said[0]
    assert len(store.runs["run-0"]) == 3

    def recover() -> None:
        store.failures_left = 0

    # Rows that came meanwhile are not mixed with those that may have arrived.
    train_steps(run, 7, 9, loss=0.0)
    write(run, "checkpoint", 9)
    has_all, said = _follow(run, lambda: None, recover)
    assert has_all
    assert said[-1] == "Trackio works again."
    assert _got(store.runs["run-0"]) == expected(run)


def test_a_run_that_goes_on_from_before_what_was_sent_is_a_new_one(tmp_path: Path, store: Store) -> None:
    run = tmp_path / "run"
    train_steps(run, 1, 4, loss=0.0)
    write(run, "checkpoint", 4)
    assert _follow(run)[0]
    # The checkpoint was damaged, so that the run begins anew.
    drop_rows_after(run / "metrics.jsonl", 0)
    train_steps(run, 1, 6, loss=5.0)
    write(run, "checkpoint", 6)
    _, said = _follow(run)
    assert ["becomes a new run" in line for line in said] == [True]
    assert [row.step for row in store.runs["run-0"]] == [1, 2, 3, 4]
    assert _got(store.runs["run-1"]) == expected(run)


def test_a_follower_of_a_killed_process_leaves_a_resumed_run_alone(tmp_path: Path, store: Store) -> None:
    run = tmp_path / "run"
    train_steps(run, 1, 2, loss=0.0)

    def resume() -> None:
        drop_rows_after(run / "metrics.jsonl", 0)
        train_steps(run, 1, 2, loss=1.0)
        write(run, "checkpoint", 2)

    assert _follow(run, lambda: None, resume, lambda: None) == (True, [])
    assert store.runs["run-0"] == []


def test_secrets_stay_here_and_the_report_goes_once(tmp_path: Path, store: Store) -> None:
    run = tmp_path / "run"
    train_steps(run, 1, 2, loss=0.0)
    write(run, "checkpoint", 2)
    assert _follow(run)[0]
    assert store.config == {"model": {"path": "m"}, "storage": {"token": "***"}}
    assert store.files == []
    (run / "export").mkdir()
    for name in ("report.html", "summary.json", "export/README.md"):
        (run / name).write_text("x")
    for _ in range(2):
        assert _follow(run)[0]
    assert store.files == ["report.html", "summary.json", "config.yaml", "model-card.md"]


def test_a_missing_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "find_spec", lambda name: None if name == "mlflow" else object())
    with pytest.raises(UserError, match="pip install 'voxtral-dist\\[mlflow\\]'"):
        refuse_missing_trackers(("mlflow", "wandb"))
    refuse_missing_trackers(("wandb",))


def test_other_ranks_follow_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_start", lambda *_: pytest.fail("a follower was started"))
    second = World(1, 2, 1, torch.device("cpu"))
    with followed_by_trackers(tmp_path, ("trackio",), second, print):
        pass
    with followed_by_trackers(tmp_path, (), alone(), print):
        pass
