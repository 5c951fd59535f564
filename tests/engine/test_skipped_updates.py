"""A skipped update leaves weights, moments, averages and the count of updates as they were, under every engine."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from voxtral_dist.config import RunConfig
from voxtral_dist.data.examples.micro_batch import MicroBatch
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.loss_scale import NUM_SKIPPED

import test_equations
from ranks import run_ranks
from runs import ROOT, run_config
from test_equations import Curve, Weights, assert_same, train_plainly, train_sharded, with_averages

# The very first update has no moments yet; the second bad one comes behind one that was made.
BAD_GRADIENT, BAD_LOSS = 0, 2
ENGINES: dict[str, tuple[int | None, dict[str, Any]]] = {
    "FSDP2": (None, {}),
    "ZeRO-0": (0, {}),
    # DeepSpeed has an optimizer of its own for stage 1 in this precision.
    "ZeRO-1 in bfloat16": (1, {}),
    "ZeRO-2": (2, {}),
    "ZeRO-2 with its optimizer on the CPU": (2, {"offload_optimizer": {"device": "cpu"}}),
    "ZeRO-3": (3, {"stage3_param_persistence_threshold": 0}),
}


@dataclass
class Spoiled:
    """An engine whose gradient is infinite in one step on every rank, and whose loss is NaN in another on one rank."""

    engine: Any
    world: World
    step_index: int = 0

    def backward(self, batch: MicroBatch, num_target_tokens: float, *, is_last: bool) -> Tensor:
        # The loss is divided by it before the backward pass.
        divisor = 1e-310 if self.step_index == BAD_GRADIENT else num_target_tokens
        loss: Tensor = self.engine.backward(batch, divisor, is_last=is_last)
        is_guilty = self.step_index == BAD_LOSS and self.world.rank == 1
        return loss * math.nan if is_guilty else loss

    def step(self, *arguments: Any) -> Any:
        before = self.states()
        update = self.engine.step(*arguments)
        is_same = all(torch.equal(one, before[name]) for name, one in self.states().items())
        assert is_same == (self.step_index in (BAD_GRADIENT, BAD_LOSS))
        self.step_index += 1
        return update

    def states(self) -> dict[str, Tensor]:
        """Weights, moments and averages of the parameters that this rank writes."""
        return {
            f"{one.name} {key}": value.clone()
            for one in self.engine.parameter_states()
            for key, value in ({"weight": one.weight, "average": one.average} | one.moments).items()
            if value is not None
        }

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


def train_all(world: World, configs: dict[str, RunConfig]) -> dict[str, tuple[Curve, Weights]]:
    from voxtral_dist.engine import build

    build_engine = build.build_engine
    engines: list[Spoiled] = []

    def build_spoiled(*arguments: Any) -> Any:
        engines.append(Spoiled(build_engine(*arguments), world))
        return engines[-1]

    build.build_engine = build_spoiled
    results = {name: train_sharded(world, config) for name, config in configs.items()}
    assert [engine.scalars()[NUM_SKIPPED] for engine in engines] == [2.0] * len(configs)
    return results


@pytest.fixture(scope="module")
def configs(tiny_model: Path, shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    folder = tmp_path_factory.mktemp("runs")
    run = with_averages(run_config(folder / "run", tiny_model, shard_folder, num_steps=5, slots_per_step=3))
    made = {}
    for name, (stage, zero) in ENGINES.items():
        engine: dict[str, Any] = {"fsdp2": {}}
        if stage is not None:
            settings = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text())
            settings["zero_optimization"] |= zero
            file = folder / f"{name.replace(' ', '-')}.json"
            file.write_text(json.dumps(settings))
            engine = {"deepspeed": file}
        tree = run.model_dump() | {"engine": engine}
        if "bfloat16" in name:
            # Averages are float32, so those that the model decodes with would not be equal.
            tree["model"] |= {"precision": "bfloat16"}
            tree["optimizer"] |= {"ema_decay": None}
        made[name] = RunConfig.model_validate(tree)
    return made


@pytest.fixture(scope="module")
def expected(configs: dict[str, RunConfig]) -> tuple[Curve, Weights]:
    return train_plainly(configs["FSDP2"], skipped=(BAD_GRADIENT, BAD_LOSS))


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("FSDP2", "ZeRO-2", "ZeRO-3"), id="often"),
        pytest.param(tuple(ENGINES), id="all", marks=pytest.mark.slow),
    ],
)
def test_a_run_with_skipped_updates_equals_one_that_never_tried_them(
    names: tuple[str, ...], configs: dict[str, RunConfig], expected: tuple[Curve, Weights]
) -> None:
    assert test_equations.NUM_STEPS == 5
    trained = run_ranks(2, train_all, {name: configs[name] for name in names})
    for name, (curve, weights) in (pair for of_rank in trained for pair in of_rank.items()):
        assert [number for number, (loss, norm) in enumerate(curve) if norm is None] == [BAD_GRADIENT]
        assert [number for number, (loss, norm) in enumerate(curve) if loss is None] == [BAD_LOSS]
        good = [point for number, point in enumerate(curve) if number not in (BAD_GRADIENT, BAD_LOSS)]
        if "bfloat16" not in name:
            assert_same((good, weights), expected, name)
