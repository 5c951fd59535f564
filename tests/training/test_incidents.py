"""An update that is not finite is recorded or ends the run on all ranks alike, with what is known about the cause."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from voxtral_dist.config import RunConfig
from voxtral_dist.data.examples.micro_batch import MicroBatch
from voxtral_dist.data.loader import build_train_loader
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.engine import StepUpdate
from voxtral_dist.engine.finite import names_not_finite
from voxtral_dist.errors import UserError
from voxtral_dist.model.prompts import VoxtralPrompts

from ranks import run_ranks
from runs import run_config


class Broken:
    """An engine with a loss of NaN in one micro-batch of the last rank, a gradient of infinity, or broken weights."""

    def __init__(self, world: World, what: str) -> None:
        self._world = world
        self._what = what
        self._num_backwards = 0

    def backward(self, batch: MicroBatch, num_target_tokens: int, *, is_last: bool) -> Tensor:
        self._num_backwards += 1
        is_guilty = self._world.rank == self._world.size - 1 and self._num_backwards == 2
        return torch.tensor(math.nan if self._what != "gradient" and is_guilty else 1.0)

    def step(self, learning_rate: float, accepts: Callable[[float], bool]) -> StepUpdate:
        return StepUpdate(math.inf, learning_rate)

    def not_finite(self) -> list[str]:
        return [f"weight.{self._world.rank}"] if self._what == "weights" else []


def refused(world: World, config: RunConfig, what: str) -> tuple[str, list[tuple[str, ...]]]:
    """The sentence of the first step, and the keys of each of this rank's micro-batches."""
    from voxtral_dist.train import build_train_step

    prompts = VoxtralPrompts.from_pretrained(config.model.path)
    loader = build_train_loader(config.train_data, prompts, config.seed, 3, world.rank, world.size)
    step = build_train_step(config, Broken(world, what), world, newest_checkpoint=lambda: "step-0000004")
    batches = next(loader.starting_at(0))
    with pytest.raises(UserError) as refusal:
        step.run(batches)
    return str(refusal.value), [batch.keys for batch in batches.micro_batches]


@pytest.mark.parametrize("what", ["loss", "gradient", "weights"])
def test_all_ranks_name_samples_weights_and_the_last_finite_checkpoint(
    what: str, tiny_model: Path, shard_folder: Path, tmp_path: Path
) -> None:
    optimizer = {"learning_rate": 2e-3, "warmup_steps": 2, "max_skipped_in_a_row": 0}
    config = run_config(tmp_path, tiny_model, shard_folder, num_steps=3, optimizer=optimizer)
    (sentence, first), (other, last) = run_ranks(2, refused, config, what)
    assert sentence == other
    assert "at step 1, so the run ends" in sentence
    assert "The last finite checkpoint is step-0000004" in sentence
    named = {key for keys in first + last for key in keys if f"{key} (" in sentence}
    match what:
        case "loss":
            assert named == {*last[1]}, "those of the guilty micro-batch only"
            assert "The weights were finite" in sentence
        case "gradient":
            assert named == {key for keys in first + last for key in keys}
        case "weights":
            assert named == set()
            assert "2 parameters, such as `weight.0`, had values that were not finite before this step" in sentence


class Recovering(Broken):
    """An engine whose loss is NaN in the first steps, which counts the updates that it makes."""

    def __init__(self, world: World, num_broken: int) -> None:
        super().__init__(world, "loss")
        self._num_broken = num_broken
        self.num_updates = 0

    def step(self, learning_rate: float, accepts: Callable[[float], bool]) -> StepUpdate:
        self._num_broken -= 1
        if self._num_broken > 0:
            self._num_backwards = 0
        self.num_updates += accepts(1.0)
        return StepUpdate(1.0, learning_rate)


def incidents(world: World, config: RunConfig, num_broken: int) -> tuple[list[dict[str, Any] | None], int, str]:
    """The events of all steps, the number of updates, and the sentence that ended the run."""
    from voxtral_dist.train import build_train_step

    prompts = VoxtralPrompts.from_pretrained(config.model.path)
    loader = build_train_loader(config.train_data, prompts, config.seed, 3, world.rank, world.size)
    engine: Any = Recovering(world, num_broken)
    step = build_train_step(config, engine, world)
    events = []
    try:
        for number, batches in enumerate(loader.starting_at(0), 1):
            result = step.run(batches)
            events.append(result.incident and json.loads(json.dumps(result.incident.event)))
            assert result.metrics.num_skipped == result.guards.num_skipped == min(number, num_broken)
            assert (result.metrics.loss is None) == (result.incident is not None)
    except UserError as error:
        return events, engine.num_updates, str(error)
    return events, engine.num_updates, ""


def test_updates_that_are_not_finite_are_skipped_until_there_are_too_many_in_a_row(
    tiny_model: Path, shard_folder: Path, tmp_path: Path
) -> None:
    optimizer = {"learning_rate": 2e-3, "warmup_steps": 2, "max_skipped_in_a_row": 2}
    config = run_config(tmp_path, tiny_model, shard_folder, num_steps=3, optimizer=optimizer)
    both = run_ranks(2, incidents, config, 2)
    assert both[0] == both[1]
    (first, second, third), num_updates, sentence = both[0]
    assert third is None
    assert (num_updates, sentence) == (1, "")
    for event in (first, second):
        assert (event["event"], event["reason"], event["loss"]) == ("skipped_update", "loss", None)
        assert event["num_samples"] == len(event["samples"]) > 0
    events, num_updates, sentence = run_ranks(2, incidents, config, 3)[1]
    assert len(events) == 2
    assert num_updates == 0
    assert "at step 3 after 2 skipped updates in a row, so the run ends" in sentence


def test_names_of_tensors_that_are_not_finite() -> None:
    tensors = {
        "nan": torch.tensor([1.0, math.nan]),
        "infinity": torch.tensor([-math.inf, 1.0], dtype=torch.bfloat16),
        "both": torch.tensor([math.inf, -math.inf], dtype=torch.float16),
        "finite": torch.tensor([-1.0]),
        "large": torch.full((4,), torch.finfo(torch.float32).max),
        "codes": torch.tensor([255], dtype=torch.uint8),
        "empty": torch.zeros(0),
    }
    assert names_not_finite(tensors.items()) == ["nan", "infinity", "both"]
