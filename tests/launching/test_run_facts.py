"""How long a stopped run may take."""

import json

import pytest

from voxtral_dist.config import load_config
from voxtral_dist.config.builtin import recipes
from voxtral_dist.launching.run_facts import grace_seconds, measured_save_seconds, planned_save_seconds, save_seconds


def test_the_longest_measured_save_counts(tmp_path):
    assert measured_save_seconds(tmp_path) is None
    rows = [
        {"kind": "train", "step": 1, "seconds": 500.0},
        {"kind": "checkpoint", "step": 1, "seconds": 31.5},
        {"kind": "checkpoint", "step": 2, "seconds": 90},
        {"kind": "checkpoint", "step": 3},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "check\n')
    assert measured_save_seconds(tmp_path) == 90


@pytest.mark.parametrize(("save", "uploads", "grace"), [(65, False, 300), (65, True, 480), (0.5, False, 120)])
def test_a_stopped_run_may_finish_its_step_and_save(save, uploads, grace):
    assert grace_seconds(save, uploads=uploads) == grace


MINI = 4_674_351_104
"""Trained parameters of Voxtral-Mini-3B: all but the encoder's positions."""


@pytest.mark.parametrize(
    ("recipe", "overrides", "num_bytes"),
    [
        ("voxtral_mini_full", [], 12 * MINI),
        ("voxtral_mini_full", ["optimizer.ema_decay=0.999"], 16 * MINI),
        # On 16 GPUs; the number of ranks decides nothing.
        ("voxtral_mini_fsdp2", ["engine.fsdp2.ranks_per_replica=8"], 12 * MINI),
        ("voxtral_mini_fsdp2", ["optimizer.master_weights=false"], 10 * MINI),
    ],
)
def test_a_save_is_planned_by_the_size_of_the_checkpoint(tmp_path, recipe, overrides, num_bytes):
    config = load_config(recipes()[recipe], [*overrides, f"run_dir={tmp_path}"])
    assert planned_save_seconds(config) == pytest.approx(num_bytes / 1e9, rel=1e-6)
    assert save_seconds(config) == (planned_save_seconds(config), "planned for 1 GB/s")


def test_a_save_of_adapters_is_short(tmp_path):
    lora = load_config(recipes()["voxtral_mini_lora"], [f"run_dir={tmp_path}"])
    assert 0 < planned_save_seconds(lora) < 5
