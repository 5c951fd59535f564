"""Rehearsals of a run: they find what a run would find, and leave nothing behind."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

from voxtral_dist.config import RunConfig

from runs import run_config, train_as_users_do


def config_of(run_dir: Path, model: Path, shards: Path, **sections: Any) -> RunConfig:
    return run_config(run_dir, model, shards, num_steps=400, slots_per_step=2, stage=1, **sections)


def test_a_dry_run_on_two_ranks_shows_data_labels_and_memory_and_writes_nothing(tiny_model, shard_folder, tmp_path):
    test_sets = {"speech": {"shards": str(shard_folder)}}
    config = config_of(tmp_path / "run", tiny_model, shard_folder, evaluation={"test_sets": test_sets})
    ended = train_as_users_do(config, 2, "--dry-run")
    assert ended.code == 0, ended.output
    shown = ended.output.splitlines()
    assert [line for line in shown if line.startswith("an epoch has ")]
    assert sum("in a micro-batch x 1 accumulated x 2 ranks" in line for line in shown) == 1
    assert sum(line.startswith("Warning: ") and "more than 20" in line for line in shown) == 1
    examples = [place for place, line in enumerate(shown) if line.startswith("example ")]
    assert len(examples) == 3, "of two steps, because rank 0 has two in each"
    for place in examples:
        assert shown[place + 1].startswith("  no targets  <s> [INST] [BEGIN_AUDIO] [AUDIO] x ")
        assert shown[place + 2].startswith("  targets     ")
        assert shown[place + 2].endswith(" </s>")
    assert [line for line in shown if line.startswith("ZeRO-1 on 2 ranks: ")]
    end = shown.index(f"Dry run: all is ready, and nothing was written to {tmp_path / 'run'}.")
    assert shown[end - 1].startswith("Training for 400 steps (")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_is_refused_for_what_a_run_is_refused_for(tiny_model, shard_folder, tmp_path):
    config = config_of(tmp_path / "run", tiny_model, shard_folder)
    (tmp_path / "file").touch()
    ended = train_as_users_do(config, 1, "--dry-run", f"run_dir={tmp_path / 'file' / 'run'}")
    assert ended.code == 2
    assert f"`run_dir`: {tmp_path / 'file' / 'run'} cannot be created or written" in ended.output


@pytest.mark.parametrize(("learning_rate", "num_updates", "is_learned"), [(3e-2, 60, True), (1e-9, 2, False)])
def test_one_batch_is_learned_or_not(tiny_model, shard_folder, tmp_path, learning_rate, num_updates, is_learned):
    optimizer = {"learning_rate": learning_rate, "warmup_steps": 100}
    config = config_of(tmp_path / "run", tiny_model, shard_folder, optimizer=optimizer)
    before = set(Path(tempfile.gettempdir()).glob("voxtral-dist-*"))
    ended = train_as_users_do(config, 2, f"--overfit-batch={num_updates}")
    assert ended.code == (0 if is_learned else 1), ended.output
    said = [line for line in ended.output.splitlines() if "earned: the loss of one batch" in line]
    assert len(said) == 1, "rank 0 says it"
    assert said[0].startswith("Learned: " if is_learned else "Not learned: ")
    assert f"Nothing was written to {tmp_path / 'run'}." in ended.output
    assert "Traceback" not in ended.output
    assert not (tmp_path / "run").exists()
    assert set(Path(tempfile.gettempdir()).glob("voxtral-dist-*")) <= before
