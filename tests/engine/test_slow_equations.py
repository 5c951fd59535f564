"""The same equations with a compiled extension, and in half precision, which is slow on CPUs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from voxtral_dist.config import RunConfig

import test_checkpoint
import test_equations
from ranks import run_ranks
from runs import run_config

pytestmark = pytest.mark.slow
LAST_STEP = 5


@pytest.fixture
def config(tiny_model: Path, shard_folder: Path, tmp_path: Path) -> RunConfig:
    return run_config(tmp_path / "run", tiny_model, shard_folder, num_steps=LAST_STEP, slots_per_step=5)


@pytest.fixture(scope="module")
def offload_extension() -> None:
    """Compile DeepSpeed's Adam for CPUs, which takes minutes, once."""
    command = [Path(sys.executable).with_name("voxtral-dist"), "doctor", "--with-offload"]
    subprocess.run(command, check=True)


@pytest.mark.usefixtures("offload_extension")
def test_offloading_everything_equals_one_plain_process_and_resumes(config: RunConfig, tmp_path: Path) -> None:
    file = config.engine.deepspeed.with_name("zero3_offload.json")
    config = test_equations.with_averages(config)
    offloaded = config.model_copy(update={"engine": config.engine.model_copy(update={"deepspeed": file})})
    for result in run_ranks(2, test_equations.train_sharded, offloaded):
        test_equations.assert_same(result, test_equations.train_plainly(config))
    # DeepSpeed's Adam for CPUs does not reproduce the last digit of float32 after a restart.
    assert_resumes(offloaded, tmp_path, relative=1e-6)


@pytest.mark.parametrize(
    ("engine", "precision"),
    [("1", "bfloat16"), ("2", "bfloat16"), ("3", "bfloat16"), ("fsdp2", "bfloat16"), ("fsdp2", "float16")],
)
def test_half_precision_follows_float32_and_resumes_to_the_last_digit(
    config: RunConfig, tmp_path: Path, engine: str, precision: str
) -> None:
    model = config.model.model_copy(update={"precision": precision})
    half = test_checkpoint.with_engine(config.model_copy(update={"model": model}), engine, tmp_path / "half")
    curve, _ = run_ranks(2, test_equations.train_sharded, half)[0]
    expected, _ = test_equations.train_plainly(config)
    assert [loss for loss, _ in curve] == pytest.approx([loss for loss, _ in expected], rel=5e-3)
    assert_resumes(half, tmp_path)


def assert_resumes(config: RunConfig, folder: Path, relative: float = 0.0) -> None:
    unbroken = config.model_copy(update={"run_dir": folder / "unbroken"})
    broken = config.model_copy(update={"run_dir": folder / "broken"})
    losses, _ = run_ranks(2, test_checkpoint.train_to, unbroken, LAST_STEP)[0]
    first, _ = run_ranks(2, test_checkpoint.train_to, broken, 3)[0]
    rest, _ = run_ranks(2, test_checkpoint.train_to, broken, LAST_STEP)[0]
    assert first + rest == pytest.approx(losses, rel=relative, abs=0.0)
