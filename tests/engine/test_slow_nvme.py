"""Offload to NVMe: the same numbers, and a model whose states are larger than the memory it trains in."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_zero import train_and_resume

from voxtral_dist.config import RunConfig
from voxtral_dist.distributed.world import World
from voxtral_dist.model.tiny import TinyShape, build_tiny_voxtral

import test_equations
from corpora import TINY_SHAPE
from ranks import run_ranks
from runs import ROOT, run_config

pytestmark = pytest.mark.slow
LAST_STEP = test_equations.NUM_STEPS

# Even split over 2 ranks, its matrices exceed the 1 MiB above which DeepSpeed puts a partition on the drive.
WIDE = replace(TINY_SHAPE, text_width=768)
# 132 million parameters: 1.6 GB of float32 weights and moments.
LARGE = TinyShape(text_width=1024, text_layers=10, text_heads=8, text_kv_heads=8, text_ffn_width=2816)
STATES_BYTES_PER_PARAMETER = 12


@pytest.fixture(scope="module", autouse=True)
def extensions() -> None:
    """Compile DeepSpeed's Adam for CPUs and its asynchronous I/O, which takes minutes, once."""
    command = [Path(sys.executable).with_name("voxtral-dist"), "doctor", "--with-nvme"]
    done = subprocess.run(command, capture_output=True, text=True)
    if "libaio" in done.stdout + done.stderr:
        pytest.skip("libaio's headers are not installed")
    assert done.returncode == 0, done.stdout


def on_drive(model: Path, shards: Path, folder: Path, file: str, sub_group_size: int) -> RunConfig:
    """A run with one of our DeepSpeed files, with sub-groups so small that there are several."""
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
    # DeepSpeed's Adam for CPUs does not reproduce the last digit of float32 after a restart.
    run_ranks(2, train_and_resume, config, 1e-6)


def train_in(world: World, config: RunConfig, memory_bytes: int) -> list[float]:
    """The losses of a run that may add `memory_bytes` of private memory (RLIMIT_DATA), its model included."""
    from voxtral_dist.data.loader import build_train_loader
    from voxtral_dist.engine.build import build_engine
    from voxtral_dist.model.features import LogMel
    from voxtral_dist.model.prompts import VoxtralPrompts
    from voxtral_dist.train import build_train_step

    prompts = VoxtralPrompts.from_pretrained(config.model.path)
    loader = build_train_loader(config.train_data, prompts, config.seed, config.num_steps, world.rank, world.size)
    log_mel = LogMel.from_pretrained(config.model.path, world.device)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    limit = int(status["VmData"].split()[0]) * 1024 + memory_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    engine = build_engine(config, log_mel, world)
    train_step = build_train_step(config, engine, world)
    return [train_step.run(batches).metrics.loss for batches in loader.starting_at(0)]


def test_states_on_a_drive_train_in_less_memory_than_they_have_bytes(
    shard_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("large")
    build_tiny_voxtral(folder / "model", LARGE)
    num_parameters = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors")) // 4
    # Less than the size of the states; it must suffice for buffers, gradients (4 bytes per parameter) and the rest.
    memory_bytes = round(0.8 * num_parameters * STATES_BYTES_PER_PARAMETER)
    on_nvme = on_drive(folder / "model", shard_folder, folder / "nvme", "zero3_nvme.json", 5_000_000)
    losses = run_ranks(1, train_in, on_nvme, memory_bytes)[0]
    assert losses[-1] < losses[0]
    in_memory = on_drive(folder / "model", shard_folder, folder / "cpu", "zero3_offload.json", 5_000_000)
    with pytest.raises(AssertionError, match=r"(not enough memory|MemoryError|[Cc]annot allocate|std::bad_alloc)"):
        run_ranks(1, train_in, in_memory, memory_bytes)
