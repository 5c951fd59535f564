"""A command run in this process, and the files that commands take."""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import soundfile
import yaml
from rich.console import Console

from voxtral_dist import progress

from commands import Result, run_command
from corpora import tone

Run = Callable[..., Result]


@pytest.fixture
def run(capsys, monkeypatch) -> Run:
    """Runs a command in this process."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    return partial(run_command, capsys)


@pytest.fixture
def recipe(tmp_path, tiny_model, shard_folder) -> Path:
    """A configuration that would train."""
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    tree = {
        "run_dir": str(tmp_path / "run"),
        "num_steps": 2,
        "model": {"path": str(tiny_model), "precision": "float32"},
        "train_data": {"shards": [str(shard_folder)], "slots_per_step": 1, "max_examples": 4, "num_workers": 0},
        "optimizer": {"learning_rate": 1e-4, "warmup_steps": 0},
        "engine": {"deepspeed": str(tmp_path / "ds.json")},
        "evaluation": {"test_sets": {"speech": {"shards": str(shard_folder)}}},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def clip(tmp_path) -> Path:
    soundfile.write(tmp_path / "clip.wav", tone(0.5), 16_000)
    return tmp_path / "clip.wav"


@pytest.fixture
def terminal(monkeypatch) -> io.StringIO:
    """What a terminal shows of the progress of commands; without this fixture there is no terminal."""
    shown = io.StringIO()
    monkeypatch.setattr(
        progress, "Console", lambda **_: Console(file=shown, force_terminal=True, color_system=None, width=100)
    )
    return shown
