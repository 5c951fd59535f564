"""Runs as long as their configuration says, in epochs and in hours; stopped and resumed they are the unbroken run."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from voxtral_dist.checkpoints.loading import load_checkpoint
from voxtral_dist.config import ModelConfig, RunConfig
from voxtral_dist.data.examples.micro_batch import collate
from voxtral_dist.data.examples.reader import UtteranceReader
from voxtral_dist.data.stored.index import read_index
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.loss import LossOfMicroBatch
from voxtral_dist.engine.optim import learning_rate
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.model.weights import load_voxtral
from voxtral_dist.train import EXIT_STOPPED
from voxtral_dist.training.metrics_file import read_metrics

from ranks import run_ranks
from runs import run_config

# 26 utterances in steps of four micro-batches of two examples.
STEPS_PER_EPOCH = 4
CPU = torch.device("cpu")


def train(world: World, config: RunConfig) -> int:
    from voxtral_dist.train import train

    return train(config, world)


def train_to_signal(world: World, config: RunConfig, step: int) -> int:
    """Train until the last rank alone is signalled, in a step."""
    from voxtral_dist.train import train
    from voxtral_dist.training.metrics_log import MetricsLog

    write_step = MetricsLog.train_step

    def write_and_signal(self: MetricsLog, done: int, metrics: Any) -> None:
        write_step(self, done, metrics)
        if done == step and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    MetricsLog.train_step = write_and_signal  # type: ignore[method-assign]
    return train(config, world)


def train_by_clock(world: World, config: RunConfig, step_seconds: float, evaluation_seconds: float) -> int:
    """Train by a clock on which a step, a save of 400 s and an evaluation take known times, except on rank 0.

    There nothing takes time, so it learns from the others alone when to stop.
    """
    from voxtral_dist import train as run
    from voxtral_dist.checkpoints.directory import CheckpointDirectory
    from voxtral_dist.training import time_limit
    from voxtral_dist.training.evaluator import Evaluator
    from voxtral_dist.training.step import TrainStep

    now = 0.0

    def taking(seconds: float, method: Any) -> Any:
        def timed(*arguments: Any) -> Any:
            nonlocal now
            now += 0.0 if world.is_first and world.size > 1 else seconds
            return method(*arguments)

        return timed

    def step_of(self: TrainStep, *arguments: Any) -> Any:
        result = make_step(self, *arguments)
        return replace(result, metrics=replace(result.metrics, step_seconds=step_seconds))

    make_step = taking(step_seconds, TrainStep.run)
    TrainStep.run = step_of  # type: ignore[method-assign]
    CheckpointDirectory.save = taking(400.0, CheckpointDirectory.save)  # type: ignore[method-assign]
    Evaluator.evaluate = taking(evaluation_seconds, Evaluator.evaluate)  # type: ignore[method-assign]
    run.TimeLimit = partial(time_limit.TimeLimit, clock=lambda: now)  # type: ignore[misc, assignment]
    code = run.train(config, world)
    assert now < 3600
    return code


def rows_of(config: RunConfig, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_metrics(config.run_dir / "metrics.jsonl") if row["kind"] == kind]


def losses(config: RunConfig) -> list[float]:
    rows = rows_of(config, "train")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "every step has one row"
    return [row["loss"] for row in rows]


def run_of_epochs(run_dir: Path, model: Path, shards: Path, **sections: Any) -> RunConfig:
    """A run whose labels are smoothed and whose weights are averaged."""
    config = run_config(run_dir, model, shards, num_steps=100, stage=2, metrics={"tensorboard": False}, **sections)
    tree = config.model_dump()
    changed = {"model": tree["model"] | {"label_smoothing": 0.2}, "optimizer": tree["optimizer"] | {"ema_decay": 0.7}}
    return RunConfig.model_validate(tree | changed | {"num_steps": None, "num_epochs": 2.5})


@pytest.fixture(scope="module")
def unbroken(tiny_model: Path, shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of two and a half epochs on two ranks that never stopped."""
    config = run_of_epochs(tmp_path_factory.mktemp("runs") / "unbroken", tiny_model, shard_folder)
    assert run_ranks(2, train, config) == [0, 0]
    return config


def test_a_run_of_epochs_has_their_steps_and_its_schedule_ends_with_them(unbroken: RunConfig) -> None:
    num_steps = round(2.5 * STEPS_PER_EPOCH)
    assert len(losses(unbroken)) == num_steps
    expected = [learning_rate(unbroken.optimizer, step, num_steps) for step in range(num_steps)]
    assert [row["learning_rate"] for row in rows_of(unbroken, "train")] == pytest.approx(expected)
    assert expected[-1] == pytest.approx(unbroken.optimizer.learning_rate * 0.1), "the end of the cosine"
    summary = json.loads((unbroken.run_dir / "summary.json").read_text())
    assert summary["num_steps"] == num_steps
    started = rows_of(unbroken, "event")[0]
    assert (started["event"], started["num_steps"], started["num_epochs"]) == ("started", num_steps, 2.5)


def test_a_run_of_epochs_resumes_on_another_number_of_ranks(unbroken: RunConfig, tmp_path: Path) -> None:
    config = unbroken.model_copy(update={"run_dir": tmp_path / "run"})
    assert run_ranks(2, train_to_signal, config, 5) == [EXIT_STOPPED] * 2
    assert len(losses(config)) == 6, "the ranks agree in the step after the signal"
    assert run_ranks(1, train, config) == [0]
    assert losses(config) == pytest.approx(losses(unbroken), rel=1e-5)


def unsmoothed_loss(config: RunConfig, model: nn.Module, prompts: VoxtralPrompts) -> float:
    """The mean cross entropy of the first utterance."""
    batch = collate([UtteranceReader(read_index(config.train_data.shards), prompts, None).example(0)], prompts)
    loss_sum = LossOfMicroBatch(LogMel.from_pretrained(config.model.path, CPU), 512)(model, batch)
    return loss_sum.item() / batch.num_target_tokens


def checkpoints(config: RunConfig) -> list[int]:
    return [row["step"] for row in rows_of(config, "checkpoint")]


def test_a_run_ends_in_time_and_the_same_command_resumes_it(unbroken: RunConfig, tmp_path: Path) -> None:
    config = unbroken.model_copy(update={"run_dir": tmp_path / "run", "max_run_hours": 1.0})
    # Six steps take half an hour; a save measures that it takes 400 s. Two more steps and a save end at 3,300 s.
    assert run_ranks(2, train_by_clock, config, 300.0, 0.0) == [EXIT_STOPPED] * 2
    assert checkpoints(config) == [7, 8]
    assert json.loads((config.run_dir / "checkpoints" / "step-0000008" / "complete.json").read_text())
    assert run_ranks(1, train, config) == [0]
    assert losses(config) == pytest.approx(losses(unbroken), rel=1e-5)


def test_a_run_stops_before_an_evaluation_that_would_end_too_late(
    unbroken: RunConfig, tiny_model: Path, shard_folder: Path, prompts: VoxtralPrompts, tmp_path: Path
) -> None:
    test_set = {"shards": str(shard_folder), "max_utterances": 1}
    config = run_of_epochs(
        tmp_path / "run",
        tiny_model,
        shard_folder,
        evaluation={"test_sets": {"dev": test_set}, "every_steps": 3, "max_tokens_per_second": 1.0},
    )
    config = config.model_copy(update={"max_run_hours": 1.0})
    # The first evaluation ends at 1,200 s, three steps at 2,100 s, a save at 2,500 s: 1,500 s more may be too long.
    assert run_ranks(1, train_by_clock, config, 300.0, 1200.0) == [EXIT_STOPPED]
    assert checkpoints(config) == [3]
    (at_start,) = rows_of(config, "evaluation")
    assert at_start["step"] == 0
    initial = load_voxtral(ModelConfig(path=str(tiny_model), precision="float32")).eval()
    assert at_start["loss"] == pytest.approx(unsmoothed_loss(config, initial, prompts), rel=1e-5)
    assert run_ranks(1, train, config) == [0]
    assert [row["step"] for row in rows_of(config, "evaluation")] == [0, 3, 6, 9, 10]
    # An evaluation lends the averages to the model, and the run goes on as without it.
    assert losses(config) == pytest.approx(losses(unbroken), rel=1e-5)
    last = str(config.run_dir / "checkpoints" / "step-0000010")
    of_averages, of_step = (load_checkpoint(last, CPU, "auto", ema=ema) for ema in (True, False))
    measured = rows_of(config, "evaluation")[-1]["loss"]
    assert measured == pytest.approx(unsmoothed_loss(config, of_averages, prompts), rel=1e-5)
    assert measured != pytest.approx(unsmoothed_loss(config, of_step, prompts), rel=1e-3)
