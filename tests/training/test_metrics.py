"""Measurements of a step over ranks, and where they are written and shown."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from voxtral_dist.config import RunConfig
from voxtral_dist.data.examples.micro_batch import MicroBatch
from voxtral_dist.data.loader import build_train_loader
from voxtral_dist.distributed.devices import known_peak_flops, peak_flops, peak_memory_bytes
from voxtral_dist.distributed.world import World, alone
from voxtral_dist.engine.engine import StepUpdate
from voxtral_dist.errors import WriteError
from voxtral_dist.model.flops import training_flops
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.training import metrics_file
from voxtral_dist.training.metrics_file import DAMAGED_FILE, Metrics, read_metrics, split_metrics
from voxtral_dist.training.metrics_log import LookedUp, MetricsLog
from voxtral_dist.training.step_metrics import StepMetrics

from ranks import run_ranks
from runs import run_config, scalars_of

STEP = StepMetrics(
    loss=2.0,
    num_target_tokens=50,
    num_tokens=400,
    audio_seconds=30.0,
    model_flops=6e12,
    learning_rate=1e-4,
    grad_norm=0.5,
    step_seconds=2.0,
    waiting_seconds=0.05,
    memory_gigabytes=31.25,
)


class NoModel:
    """An engine that computes nothing: the counts of a step do not depend on it."""

    def backward(self, batch: MicroBatch, num_target_tokens: int, *, is_last: bool) -> Tensor:
        return torch.zeros(())

    def step(self, learning_rate: float, accepts: Callable[[float], bool]) -> StepUpdate:
        return StepUpdate(0.0, learning_rate)


def measured(world: World, config: RunConfig) -> list[StepMetrics]:
    """Two steps of each rank; rank r waited r seconds for data."""
    from voxtral_dist.train import build_train_step

    prompts = VoxtralPrompts.from_pretrained(config.model.path)
    loader = build_train_loader(config.train_data, prompts, config.seed, 2, world.rank, world.size)
    train_step = build_train_step(config, NoModel(), world, training_flops(config.model, config.trainable))
    waited = (replace(batches, waiting_seconds=float(world.rank)) for batches in loader.starting_at(0))
    return [train_step.run(batches).metrics for batches in waited]


def test_sums_do_not_depend_on_ranks_and_the_wait_is_that_of_the_slowest_rank(
    tiny_model: Path, shard_folder: Path, tmp_path: Path
) -> None:
    # 5 slots on 2 ranks: one of them runs a micro-batch of weight zero, which does not count.
    config = run_config(tmp_path / "run", tiny_model, shard_folder, num_steps=3, slots_per_step=5)
    one = measured(alone("cpu"), config)
    both = run_ranks(2, measured, config)
    for metrics in both:
        for step, expected in zip(metrics, one, strict=True):
            assert step.num_tokens == expected.num_tokens
            assert step.num_target_tokens == expected.num_target_tokens
            assert step.model_flops == expected.model_flops > 0
            assert step.audio_seconds == pytest.approx(expected.audio_seconds)
            assert step.waiting_seconds == 1.0
    assert len({metrics[0].memory_gigabytes for metrics in both}) == 1
    assert all(0.1 < step.memory_gigabytes < 10 for step in one)
    prompts = VoxtralPrompts.from_pretrained(config.model.path)
    loader = build_train_loader(config.train_data, prompts, config.seed, 2, 0, 1)
    batches = next(iter(loader.starting_at(0))).micro_batches
    assert one[0].num_tokens == sum(sum(batch.positions_per_example) for batch in batches)
    assert one[0].num_tokens < sum(batch.input_ids.numel() for batch in batches)


def test_rates_and_utilization_of_a_row() -> None:
    row = STEP.row(peak_flops=2 * 10e12)
    assert row["audio_seconds_per_second"] == 15.0
    assert row["target_tokens_per_second"] == 25.0
    assert row["tokens_per_second"] == 200.0
    assert row["model_flops_utilization"] == pytest.approx(0.15)
    assert STEP.row(peak_flops=None)["model_flops_utilization"] is None


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100 80GB PCIe", "float32", 19.5),
        ("NVIDIA A10", "float16", 125),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA H200", "bfloat16", 989),
        ("NVIDIA GH200 480GB", "bfloat16", 989),
        ("NVIDIA B200", "bfloat16", 2250),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA L40S", "bfloat16", 362),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("Tesla V100-SXM2-32GB", "float16", 125),
        ("Tesla V100-SXM2-32GB", "bfloat16", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
        ("NVIDIA A10G", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3", "float8", 1978),
        ("NVIDIA L40S", "float8", 724),
        ("NVIDIA A100-SXM4-80GB", "float8", None),
        ("AMD Instinct MI300X", "bfloat16", None),
    ],
)
def test_data_sheets_by_the_name_of_the_device(name: str, precision: str, tflops: float | None) -> None:
    known = known_peak_flops(name, precision)
    assert known == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_a_cpu_has_no_utilization_unless_its_peak_is_told() -> None:
    cpu = torch.device("cpu")
    assert peak_flops(cpu, "float32", None) is None
    assert peak_flops(cpu, "float32", 0.5) == 0.5e12


def test_resident_memory_is_a_high_water_mark() -> None:
    cpu = torch.device("cpu")
    before = peak_memory_bytes(cpu)
    block = torch.ones(before // 4 + 2**20)
    with_block = peak_memory_bytes(cpu)
    assert with_block > before
    del block
    # Linux counts pages in batches for each core, so the mark wavers by some of them.
    assert peak_memory_bytes(cpu) > with_block - 2**22


def test_lines_of_a_run_skip_the_first_step_and_show_long_waits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with MetricsLog(tmp_path, 3, 0, alone("cpu"), peak_flops=10e12) as log:
        # Compilation: a hundred times slower.
        log.train_step(1, replace(STEP, step_seconds=200.0))
        log.train_step(2, STEP)
        log.train_step(3, replace(STEP, waiting_seconds=0.9))
    first, last = capsys.readouterr().out.splitlines()
    assert "step 1/3  loss 2.000  lr 1.0e-04  0 audio s/s  MFU 0.3 %  31.2 GB  left 6.7 min" in first
    assert (
        "step 3/3  loss 2.000  lr 1.0e-04  15 audio s/s  MFU 30.0 %  31.2 GB  waiting for data 25 %  left 0.0 min"
        in last
    )


def test_what_is_not_known_is_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsLog(tmp_path, 1, 0, alone("cpu")) as log:
        log.train_step(1, STEP)
    assert capsys.readouterr().out == "step 1/1  loss 2.000  lr 1.0e-04  15 audio s/s  31.2 GB  left 0.0 min\n"


def test_tensorboard_has_the_rows_once_after_a_resume(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 9, 0, alone("cpu"), with_tensorboard=True).__enter__()
    log.write("evaluation", 0, {"name": "dev", "wer": 1.5, "biased_wer": None, "num_utterances": 4})
    for step in range(1, 6):
        log.train_step(step, replace(STEP, loss=float(step)))
    # Killed here: nothing is closed, and the run resumes from a checkpoint of step 3.
    with MetricsLog(tmp_path, 9, 3, alone("cpu"), peak_flops=10e12, with_tensorboard=True) as resumed:
        for step in range(4, 8):
            resumed.train_step(step, replace(STEP, loss=10.0 + step))
        resumed.write("evaluation", 7, {"name": "dev", "wer": 0.5, "num_utterances": 4})
        resumed.write("checkpoint", 7, {"path": "step-0000007"})
        resumed.write("event", 7, {"event": "bad_utterance", "key": "x"})
    scalars = scalars_of(tmp_path)
    assert scalars["train/loss"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 14.0), (5, 15.0), (6, 16.0), (7, 17.0)]
    assert scalars["train/model_flops_utilization"] == [(step, pytest.approx(0.3)) for step in range(4, 8)]
    assert scalars["evaluation/dev/wer"] == [(0, 1.5), (7, 0.5)]
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if row["kind"] == "train"]
    assert scalars["train/loss"] == [(row["step"], row["loss"]) for row in rows]
    keys = {key for row in rows for key, value in row.items() if isinstance(value, (int, float))} - {"step"}
    told = {"wer", "num_utterances"}
    assert set(scalars) == {f"train/{key}" for key in keys} | {f"evaluation/dev/{key}" for key in told}


def test_without_tensorboard_a_run_continues_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with MetricsLog(tmp_path, 9, 0, alone("cpu"), with_tensorboard=True) as log:
        log.write("evaluation", 0, {"name": "dev", "wer": 1.5})
        log.train_step(1, STEP)
    assert capsys.readouterr().out.count("pip install 'voxtral-dist[tensorboard]'") == 1
    assert not (tmp_path / "tensorboard").exists()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    second = World(rank=1, size=2, local_rank=1, device=torch.device("cpu"))
    with MetricsLog(tmp_path, 9, 0, second, with_tensorboard=True) as log:
        log.train_step(1, STEP)
    assert list(tmp_path.iterdir()) == []


def test_a_summary_weighs_steps_by_their_time_and_takes_older_rows(tmp_path: Path) -> None:
    from voxtral_dist.checkpoints.progress import TrainProgress
    from voxtral_dist.training.selection import Verdict
    from voxtral_dist.training.summary import write_summary

    with MetricsLog(tmp_path, 3, 0, alone("cpu"), peak_flops=10e12) as log:
        log.write("train", 1, {"loss": 3.0, "step_seconds": 100.0})
        log.train_step(2, STEP)
        log.train_step(3, replace(STEP, step_seconds=6.0, waiting_seconds=2.0, memory_gigabytes=33.0))
    write_summary(tmp_path, None, TrainProgress(step=3, audio_seconds=60.0, train_seconds=8.0), Verdict())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["model_flops_utilization"] == pytest.approx(12e12 / 8.0 / 10e12)
    assert summary["waiting_fraction"] == pytest.approx(2.05 / 8.0, abs=1e-4)
    assert summary["memory_gigabytes"] == 33.0


def test_metrics_on_a_full_disk_or_in_a_folder_that_is_gone_end_with_a_sentence(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "run", 3, 0, alone("cpu")) as log:
        log.write("event", 0, {"event": "started"})
        log._file = Path("/dev/full").open("a", encoding="utf-8")  # noqa: SIM115  # closed by the log
        with pytest.raises(WriteError, match=r"metrics\.jsonl: no space left on device") as refused:
            log.write("event", 1, {"event": "lost"})
        assert refused.value.exit_code == 74
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(WriteError, match="somebody has removed or moved it"):
            log.write("event", 1, {"event": "lost"})
    assert not (tmp_path / "run").exists()


GARBLED = [
    '{"kind": "event", "step": 2, "text": "é"}'.encode()[:-3],
    b"\xff\x00garbled",
    b"[" * 50_000,
    b'{"kind": "train", "step": ' + b"1" * 5000 + b"}",
    b'{"kind": "train", "step": "2"}',
    b'{"kind": "evaluation", "step": 2, "name": "dev", "wer": "0.5"}',
    b'{"kind": "event", "step": 2, "text": "\\ud800"}',
    b"null",
    b"",
]


def test_damaged_lines_are_set_aside_and_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(tmp_path, 9, 0, alone("cpu")) as log:
        for step in range(1, 4):
            log.train_step(step, STEP)
    whole = path.read_bytes().splitlines(keepends=True)
    mixed = [
        part
        for line, damaged in zip(whole, (GARBLED[:4], GARBLED[4:7], GARBLED[7:]), strict=True)
        for part in (line, *(one + b"\n" for one in damaged))
    ]
    # Killed inside of a character of the last line.
    path.write_bytes(b"".join(mixed) + '{"kind": "event", "é'.encode()[:-1])
    capsys.readouterr()
    with MetricsLog(tmp_path, 9, 3, alone("cpu")):
        assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    said = capsys.readouterr().out
    assert said.startswith(f"Moved {len(GARBLED)} damaged lines of {path} to {DAMAGED_FILE}")
    assert path.read_bytes().splitlines(keepends=True) == whole
    assert (tmp_path / DAMAGED_FILE).read_bytes() == b"".join(line + b"\n" for line in GARBLED)
    with MetricsLog(tmp_path, 9, 3, alone("cpu")):
        pass
    assert capsys.readouterr().out == ""


def test_a_resumed_run_reads_its_rows_once_and_drops_those_after_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    selected = {"event": "selection", "sentence": "better"}
    with MetricsLog(tmp_path, 9, 0, alone("cpu")) as log:
        for step in range(1, 6):
            log.train_step(step, STEP)
        for step in (2, 4):
            log.write("checkpoint", step, {"seconds": float(step)})
            log.write("evaluation", step, {"name": "dev", "wer": 0.25})
            log.write("event", step, selected)
            log.write("event", step, {"event": "bad_utterance", "key": "x"})
        written = {name: log.rows(name) for name in get_args(LookedUp)}
    assert [row["step"] for row in written["selection"]] == [2, 4]
    read: list[Path] = []

    def counted_split(path: Path) -> Metrics:
        read.append(path)
        return split_metrics(path)

    monkeypatch.setattr(metrics_file, "split_metrics", counted_split)
    with MetricsLog(tmp_path, 9, 3, alone("cpu")) as resumed:
        kept = {name: resumed.rows(name) for name in get_args(LookedUp)}
        resumed.train_step(4, STEP)
    assert kept == {name: [row for row in rows if row["step"] == 2] for name, rows in written.items()}
    assert kept["evaluation"] == [{"kind": "evaluation", "step": 2, "name": "dev", "wer": 0.25}]
    assert kept["selection"] == [{"kind": "event", "step": 2, **selected}]
    assert read == [tmp_path / "metrics.jsonl"]
    assert "dev WER 25.0 %" in capsys.readouterr().out.splitlines()[-1]
