"""`voxtral-dist plan --gpu`: kernels' time of a run, its variants and batch sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from voxtral_dist.cli.main import build_parser, main
from voxtral_dist.config import RunConfig
from voxtral_dist.errors import UserError
from voxtral_dist.estimate.activations import MicroBatchShape
from voxtral_dist.estimate.estimate import estimate_run
from voxtral_dist.estimate.estimator import Machine
from voxtral_dist.estimate.gpus import GPUS, named_gpu
from voxtral_dist.estimate.times import BATCH_SIZES

from corpora import REPOSITORY
from runs import run_config

RECIPE = ("--config", str(REPOSITORY / "launch" / "recipes" / "voxtral_mini_fsdp2.yaml"))
# Without shards, and without evaluations.
ON_ONE_GPU = ("--set", "train_data.slots_per_step=1", "--set", "evaluation.test_sets={}", "--gpus", "1")


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        main(["plan", *RECIPE, *arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return int(str(end.value.code)), captured.err if end.value.code else captured.out


def test_times_of_the_published_model_on_one_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = plan(capsys, *ON_ONE_GPU, "--gpu", "h200", "--json")
    assert code == 0
    estimate: dict[str, Any] = json.loads(text)
    times, costs = estimate["times"], estimate["costs"]
    assert estimate["machine"]["gpu_memory"] == 141 * 10**9
    by_name = {(one["checkpointing"]["encoder"], one["is_compiled"]): one for one in times["variants"]}
    kept, again = by_name[0, False], by_name[1, False]
    # The bound of the first design for the model's own kernels of 8 clips.
    assert kept["micro_batch"]["seconds"] < 0.3
    assert by_name[0, True]["micro_batch"]["seconds"] < 0.92 * kept["micro_batch"]["seconds"]
    assert again["micro_batch"]["seconds"] > 1.2 * kept["micro_batch"]["seconds"]
    assert again["device_bytes"] < kept["device_bytes"]
    assert kept["fits"] is True
    # The recipe keeps activations and compiles blocks.
    configured = times["configured"]
    assert configured == by_name[0, True]
    step = configured["micro_batch"]["seconds"] + configured["engine_seconds"] + configured["update_seconds"]
    assert configured["step_seconds"] == pytest.approx(step)
    # 4.68 billion values: 40 bytes each in the update; some more in casts and copies.
    assert configured["update_seconds"] == pytest.approx(40 * 4.674e9 / (0.81 * 4.8e12), rel=0.01)
    assert 0.7 < configured["engine_seconds"] / configured["update_seconds"] < 1.3
    assert configured["clips_per_second"] == pytest.approx(8 / step)
    # docs/performance.md: 15.7e12 FLOPs for a clip.
    assert configured["mfu"] == pytest.approx(8 * 15.7e12 / step / 989e12, rel=0.01)
    assert costs["is_roofline"]
    assert costs["mfu"] == configured["mfu"]
    assert costs["seconds"] == pytest.approx(costs["model_flops"] / (989e12 * costs["mfu"]))
    assert costs["seconds"] == pytest.approx(costs["num_steps"] * configured["step_seconds"])
    batches = times["batches"]
    assert tuple(one["shape"]["num_examples"] for one in batches) == BATCH_SIZES
    assert batches[BATCH_SIZES.index(8)] == configured
    rates = [one["clips_per_second"] for one in batches]
    assert rates == sorted(rates), "casts and the update are divided by more clips"


@pytest.fixture
def tiny_run(tiny_model: Path, tmp_path: Path) -> RunConfig:
    return run_config(tmp_path / "run", tiny_model, tmp_path / "no-shards", num_steps=3)


def test_the_text_shows_times_variants_and_batch_sizes(tiny_run: RunConfig) -> None:
    estimate = estimate_run(tiny_run, Machine(num_gpus=2, gpu=named_gpu("A100"), gpu_memory=80 * 10**9))
    text = "\n".join(estimate.lines())
    for words in (
        "Time of kernels on A100",
        "bound by",
        "a step with 2 per GPU",
        "casts and copies of ZeRO-3",
        "clips/s",
        "FLOPs and time are those of full windows with 3 target tokens each",
    ):
        assert words in text
    assert "(by the roofline)" in text
    assert estimate.times is not None
    # ZeRO-3 refuses compiled blocks.
    assert [(one.checkpoints, one.blocks) for one in estimate.times.variants] == [
        ("kept", "eager"),
        ("checkpointed", "eager"),
    ]
    # Micro-batches of a tiny model are too small to be bound by anything but the start of kernels.
    assert estimate.times.configured.micro_batch.bound == "launches"


def test_a_gpu_without_float8_is_refused_for_it(tiny_run: RunConfig) -> None:
    pytest.importorskip("torchao")
    model = tiny_run.model.model_copy(update={"precision": "bfloat16", "float8": "rowwise", "compile_blocks": True})
    run = tiny_run.model_copy(update={"model": model})
    with pytest.raises(UserError, match="is not possible on A100, which does not multiply float8"):
        estimate_run(run, Machine(gpu=named_gpu("A100")))
    times = estimate_run(run, Machine(gpu=named_gpu("H100"))).times
    assert times is not None
    assert times.configured.micro_batch.num_kernels > 0


def test_without_a_named_gpu_only_a_measured_rate_gives_the_time(tiny_run: RunConfig) -> None:
    unknown = estimate_run(tiny_run, Machine())
    assert unknown.times is None
    assert unknown.costs.seconds is None
    assert "name the GPU" in "\n".join(unknown.lines())
    measured = estimate_run(tiny_run, Machine(mfu=0.25, peak_tflops=100.0))
    assert measured.costs.seconds == pytest.approx(measured.costs.model_flops / 25e12)
    assert "(as given)" in "\n".join(measured.lines())
    both = estimate_run(tiny_run, Machine(mfu=0.25, gpu=named_gpu("H100")))
    assert not both.costs.is_roofline
    assert both.costs.peak_tflops == pytest.approx(GPUS["H100"].peak_flops("float32") / 1e12)


def test_the_mean_micro_batch_of_the_data_is_timed(tiny_model: Path, shard_folder: Path, tmp_path: Path) -> None:
    config = run_config(tmp_path / "run", tiny_model, shard_folder, num_steps=3)
    estimate = estimate_run(config, Machine(gpu=named_gpu("L40S")))
    assert estimate.times is not None
    shape: MicroBatchShape = estimate.times.configured.shape
    assert shape == estimate.workload.typical
    assert shape.num_positions <= estimate.memory.shape.num_positions
    assert shape.num_examples == 2


def test_users_mistakes_are_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    code, error = plan(capsys, "--gpu", "H300")
    assert code == 2
    assert "`--gpu` must be one of A100, A100 40GB, " in error
    code, error = plan(capsys, "--gpu", "H200", "--device", "cpu")
    assert code == 2
    assert "`--gpu` must not be given with `--device cpu`" in error


def test_the_help_names_all_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["plan", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert ", ".join(GPUS) in text
