"""Everything on a drive: the same numbers, and a resumed run is the unbroken one."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_zero import train_and_resume

from voxtral_dist.config import RunConfig
from voxtral_dist.tiny import build_tiny_voxtral

import test_equations
from corpora import TINY_SHAPE
from ranks import run_ranks
from runs import ROOT, run_config

pytestmark = pytest.mark.slow
LAST_STEP = test_equations.NUM_STEPS

# Its matrices have more than the 1 MiB from which on DeepSpeed puts a part on the drive, with 2 ranks too.
WIDE = replace(TINY_SHAPE, text_width=768)


@pytest.fixture(scope="module", autouse=True)
def extensions() -> None:
    """DeepSpeed's Adam for CPUs and its reading and writing of drives: minutes of compilation, once."""
    command = [Path(sys.executable).with_name("voxtral-dist"), "doctor", "--with-nvme"]
    done = subprocess.run(command, capture_output=True, text=True)
    if "libaio" in done.stdout + done.stderr:
        pytest.skip("libaio's headers are not installed")
    assert done.returncode == 0, done.stdout


def on_drive(model: Path, shards: Path, folder: Path, file: str, sub_group_size: int) -> RunConfig:
    """A run under one of our files with smaller sub-groups, so that there are several of them."""
    settings = json.loads((ROOT / "ds_configs" / file).read_text())
    settings["zero_optimization"] |= {"sub_group_size": sub_group_size, "reduce_bucket_size": sub_group_size}
    folder.mkdir(exist_ok=True)
    (folder / file).write_text(json.dumps(settings))
    engine = {"deepspeed": folder / file, "nvme_dir": folder / "drive"}
    return run_config(folder / "run", model, shards, num_steps=LAST_STEP, slots_per_step=5, engine=engine)


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "wide"
    build_tiny_voxtral(folder, WIDE)
    return folder


def test_a_drive_changes_no_number_and_a_resumed_run_is_the_unbroken_one(
    wide_model: Path, shard_folder: Path, tmp_path: Path
) -> None:
    config = on_drive(wide_model, shard_folder, tmp_path, "zero3_nvme.json", 1_000_000)
    plain_curve, plain_weights = test_equations.train_plainly(config)
    for curve, weights in run_ranks(2, test_equations.train_sharded, config):
        assert [loss for loss, _ in curve] == pytest.approx([loss for loss, _ in plain_curve], rel=2e-6)
        # torch sums the squares of these large matrices in float32.
        assert [norm for _, norm in curve] == pytest.approx([norm for _, norm in plain_curve], rel=1e-4)
        assert weights.keys() == plain_weights.keys()
        for name, weight in plain_weights.items():
            assert float((weights[name] - weight).abs().max()) < 2e-6, name
    assert list((tmp_path / "drive").glob("*/zero_stage_3/optimizer/rank1/exp_avg_sq-*.swp"))
    assert list((tmp_path / "drive").glob("*/zero_stage_3/float32params/rank1/*_param.tensor.swp"))
    # DeepSpeed's Adam for CPUs does not repeat the last digit of float32 after a restart.
    run_ranks(2, train_and_resume, config, 1e-6)
