"""ZeRO's code for GPUs gives the numbers of its code for CPUs, and makes the host wait as often as is listed here."""

from __future__ import annotations

import gc
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from voxtral_dist.config import RunConfig
from voxtral_dist.data.loader import build_train_loader
from voxtral_dist.distributed.world import World
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.prompts import VoxtralPrompts

from cpu_adam import CpuAdam, install_cpu_adam
from fake_streams import StreamLog, install_streams, is_wait, num_waits
from ranks import run_ranks
from runs import ROOT, run_config

NUM_STEPS = 3
NUM_MICRO_BATCHES = 2
ON_CPU = {"device": "cpu", "pin_memory": True}


@dataclass(frozen=True)
class Variant:
    """Settings of ZeRO, and how often the host may wait: in a forward and backward pass, and in an update.

    Values that are read, such as the norm, are not counted: tensors on the CPU hide that wait.
    """

    zero: dict[str, Any]
    waits_of_a_micro_batch: int
    waits_of_an_update: int


# All of these waits are DeepSpeed's own. Stage 2 waits for the device, and stage 3 for its stream of reductions, at the
# end of a backward pass (`independent_gradient_partition_epilogue` in stage_1_and_2.py and stage3.py). Stage 2 with its
# optimizer on the CPU waits for copies of gradients, which the CPU is about to read (`_wait_for_offload_copies`).
VARIANTS = {
    "stage 1": Variant({"stage": 1}, 0, 0),
    "stage 2": Variant({"stage": 2}, 1, 0),
    "stage 3": Variant({"stage": 3, "stage3_param_persistence_threshold": 0}, 1, 0),
    "stage 2 with its optimizer on the CPU": Variant({"stage": 2, "offload_optimizer": ON_CPU}, 1, 1),
    "stage 3 with everything on the CPU": Variant(
        {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "offload_optimizer": ON_CPU,
            "offload_param": ON_CPU,
        },
        1,
        0,
    ),
}


@dataclass
class Run:
    """A run of one rank: its numbers, and the calls to streams in the backward passes and the update of its last step.

    before_cpu_update: the last call to streams before each update by the CPU.
    """

    curve: list[tuple[float, float | None]]
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    buffer_dtypes: set[torch.dtype]
    in_backward: Counter[str]
    in_update: Counter[str]
    before_cpu_update: list[str]


def train_all(world: World, configs: dict[str, RunConfig], with_streams: bool) -> dict[str, Run]:
    """One run after the other in the same ranks, because imports take longer than training."""
    install_cpu_adam(install_streams() if with_streams else StreamLog())
    runs = {}
    for name, config in configs.items():
        CpuAdam.latest_calls = []
        runs[name] = train(world, config, CpuAdam.log)
        # The hooks of engines form reference cycles.
        gc.collect()
    return runs


def train(world: World, config: RunConfig, log: StreamLog) -> Run:
    from voxtral_dist.engine.build import build_engine
    from voxtral_dist.train import build_train_step

    prompts = VoxtralPrompts.from_pretrained(config.model.path)
    loader = build_train_loader(config.train_data, prompts, config.seed, NUM_STEPS, world.rank, world.size)
    log_mel = LogMel.from_pretrained(config.model.path, world.device)
    engine: Any = build_engine(config, log_mel, world, loader.training_set.max_windows_per_micro_batch)
    update, in_backward = engine.step, Counter[str]()

    def step_after_backward(*arguments: Any) -> Any:
        in_backward.clear()
        in_backward.update(log.take())
        return update(*arguments)

    engine.step = step_after_backward
    step = build_train_step(config, engine, world)
    curve, in_update = [], Counter[str]()
    for batches in loader.starting_at(0):
        assert len(batches.micro_batches) == NUM_MICRO_BATCHES
        log.take()
        metrics = step.run(batches).metrics
        in_update = log.take()
        curve.append((metrics.loss, metrics.grad_norm))
    return Run(
        curve=curve,
        weights=dict(engine.weights()),
        moments={
            f"{one.name}//{key}": value for one in engine.parameter_states() for key, value in one.moments.items()
        },
        buffer_dtypes={buffer.dtype for buffer in engine._module.buffers()},
        in_backward=in_backward,
        in_update=in_update,
        before_cpu_update=CpuAdam.latest_calls,
    )


@pytest.fixture(scope="module")
def configs(tiny_model: Path, shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    folder = tmp_path_factory.mktemp("runs")
    made = {}
    for name, variant in VARIANTS.items():
        recipe = json.loads((ROOT / "ds_configs" / f"zero{variant.zero['stage']}.json").read_text())
        zero = recipe["zero_optimization"] | variant.zero
        settings = {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}
        file = folder / f"{name.replace(' ', '-')}.json"
        file.write_text(json.dumps(settings))
        # 3 slots do not divide evenly over 2 ranks, so one rank runs a micro-batch of weight zero.
        config = run_config(folder / name, tiny_model, shard_folder, num_steps=NUM_STEPS, slots_per_step=3)
        tree = config.model_dump()
        tree["model"] |= {"precision": "bfloat16", "activation_checkpointing": {"encoder": 1, "language_model": 1}}
        made[name] = RunConfig.model_validate(tree | {"engine": {"deepspeed": file}})
    return made


@pytest.fixture(scope="module")
def with_streams(configs: dict[str, RunConfig]) -> list[dict[str, Run]]:
    return run_ranks(2, train_all, configs, True)


@pytest.fixture(scope="module")
def without(configs: dict[str, RunConfig]) -> list[dict[str, Run]]:
    return run_ranks(2, train_all, configs, False)


@pytest.mark.parametrize("name", VARIANTS)
def test_streams_change_no_number(name: str, with_streams: list[dict[str, Run]], without: list[dict[str, Run]]) -> None:
    for rank in range(2):
        actual, expected = with_streams[rank][name], without[rank][name]
        assert actual.curve == expected.curve
        assert actual.curve[-1][0] < actual.curve[0][0], "it does not learn"
        for ours, theirs in ((actual.weights, expected.weights), (actual.moments, expected.moments)):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_host_waits_no_more_often_than_listed(name: str, with_streams: list[dict[str, Run]]) -> None:
    variant = VARIANTS[name]
    assert with_streams[0]["stage 2"].in_backward["wait_for_stream"] > 0, "DeepSpeed runs its code without streams"
    for run in (of_rank[name] for of_rank in with_streams):
        assert num_waits(run.in_backward) <= variant.waits_of_a_micro_batch * NUM_MICRO_BATCHES, run.in_backward
        assert num_waits(run.in_update) <= variant.waits_of_an_update, run.in_update


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if "offload_optimizer" in variant.zero])
def test_the_cpu_updates_after_gradients_have_arrived(name: str, with_streams: list[dict[str, Run]]) -> None:
    for run in (of_rank[name] for of_rank in with_streams):
        assert len(run.before_cpu_update) >= NUM_STEPS
        assert all(is_wait(call) for call in run.before_cpu_update), run.before_cpu_update


@pytest.mark.parametrize("name", VARIANTS)
def test_rotary_frequencies_stay_float32_in_a_bfloat16_model(name: str, without: list[dict[str, Run]]) -> None:
    assert without[0][name].buffer_dtypes == {torch.float32}
