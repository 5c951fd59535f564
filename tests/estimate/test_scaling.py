"""`voxtral-dist plan --scale`: steps and runs on one GPU to hundreds of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from voxtral_dist.config import ActivationCheckpointingConfig, EngineConfig, RunConfig, dump_config
from voxtral_dist.estimate import estimator
from voxtral_dist.estimate.checkpointing import USABLE_FRACTION, checkpointing_for
from voxtral_dist.estimate.communication import Collective
from voxtral_dist.estimate.estimator import Machine, meta_model_of
from voxtral_dist.estimate.gpus import named_gpu
from voxtral_dist.estimate.interconnect import named_network
from voxtral_dist.estimate.scaling import Scaling, estimate_scaling, exposed_seconds
from voxtral_dist.estimate.stragglers import expected_maximum, slowest_rank

from commands import run_command
from runs import run_config

NUMBERS = (1, 2, 3, 8, 64)


@pytest.fixture(scope="module")
def config(tiny_model: Path, shard_folder: Path) -> RunConfig:
    tests = {"test_sets": {"dev": {"shards": str(shard_folder)}}, "every_steps": 20}
    return run_config(
        Path("runs/scaled"),
        tiny_model,
        shard_folder,
        num_steps=60,
        slots_per_step=8,
        engine={"fsdp2": {}},
        checkpoint={"every_steps": 5},
        evaluation=tests,
    )


def scaling(
    config: RunConfig,
    network: str = "ib-ndr",
    storage: float = 1e9,
    memory: int = 141 * 10**9,
    numbers: Sequence[int] = NUMBERS,
) -> Scaling:
    machine = Machine(gpu=named_gpu("H200"), gpu_memory=memory)
    return estimate_scaling(config, machine, numbers, named_network(network), storage)


@pytest.fixture(scope="module")
def found(config) -> Scaling:
    return scaling(config)


def test_parts_of_a_step_add_up(found):
    assert tuple(row.num_gpus for row in found.rows) == NUMBERS
    for row in found.rows:
        assert row.step_seconds == pytest.approx(sum(row.step.values()))
        assert all(seconds >= -1e-12 for seconds in row.step.values())
        # What a GPU alone would need, of what it takes.
        assert row.efficiency == pytest.approx(row.step["compute"] / row.step_seconds)
        assert row.run_seconds == pytest.approx(sum(row.run.values()))
    alone = found.rows[0]
    waits = [alone.step[name] for name in ("communication", "stragglers", "idle ranks")]
    assert waits == pytest.approx([0, 0, 0], abs=1e-12)
    # Eight slots on three ranks are three rounds.
    assert found.rows[2].step["idle ranks"] > 0
    assert found.rows[1].step["idle ranks"] == found.rows[3].step["idle ranks"] == 0


def test_more_ranks_send_and_wait_more(found):
    for fewer, more in pairwise(found.rows[:4]):
        assert more.efficiency < fewer.efficiency
    assert found.rows[1].step["stragglers"] > 0
    assert found.rows[3].sent_bytes > found.rows[0].sent_bytes == 0


def test_a_run_on_more_gpus_than_slots_has_fewer_and_larger_steps(config, found):
    assert [(row.slots_per_step, row.num_steps) for row in found.rows] == [(8, 60)] * 4 + [(64, 8)]
    assert any("larger global batch" in note for note in found.notes)


def test_rows_of_automatic_checkpointing_are_those_of_what_it_chooses(config, monkeypatch):
    """Also where a replica needs more ranks than there are; the model is built once for all rows."""
    config = config.model_copy(update={"engine": EngineConfig.model_validate({"fsdp2": {"ranks_per_replica": 8}})})
    auto = with_checkpointing(config, "auto")
    needed = checkpointing_for(auto, Machine(num_gpus=8, gpu_memory=10**12))[1].device_bytes
    memory = math.floor(needed / USABLE_FRACTION) - 1
    built = []
    monkeypatch.setattr(estimator, "meta_model_of", lambda *parts: built.append(parts) or meta_model_of(*parts))
    one, eight = scaling(auto, memory=memory, numbers=(1, 8)).rows
    assert len(built) == 1
    chosen = checkpointing_for(auto, Machine(num_gpus=8, gpu_memory=memory))[0].model.checkpointing
    assert chosen != ActivationCheckpointingConfig()
    assert (eight,) == scaling(with_checkpointing(config, chosen), memory=memory, numbers=(8,)).rows
    assert (one.num_gpus, one.sent_bytes) == (1, 0)


def with_checkpointing(config: RunConfig, checkpointing: ActivationCheckpointingConfig | str) -> RunConfig:
    model = config.model.model_copy(update={"activation_checkpointing": checkpointing})
    data = config.train_data.model_copy(update={"max_windows": 8})
    return config.model_copy(update={"model": model, "train_data": data})


def test_a_slower_network_and_storage_cost_time(config, found):
    slow = scaling(config, "tcp-25", storage=1e6)
    first, last = slow.rows[0], slow.rows[-1]
    assert last.step["communication"] > found.rows[-1].step["communication"]
    assert first.run["saves"] > found.rows[0].run["saves"]
    # One node has no network.
    assert slow.rows[1].step["communication"] == found.rows[1].step["communication"]


def test_saves_that_are_waited_for_cost_their_writing(config, found):
    blocking = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"asynchronous": False})})
    row = scaling(blocking, storage=1e9).rows[0]
    assert row.run["saves"] > found.rows[0].run["saves"] > 0
    assert found.rows[0].run["evaluations"] == pytest.approx(64 * found.rows[-1].run["evaluations"] * 3)


def test_the_expected_maximum_is_that_of_many_draws():
    values = np.random.default_rng(1).gamma(3.0, size=500)
    assert expected_maximum(values, 1) == pytest.approx(values.mean())
    assert expected_maximum(values, 10**6) == pytest.approx(values.max())
    draws = np.random.default_rng(2).choice(values, (100_000, 16))
    assert expected_maximum(values, 16) == pytest.approx(draws.max(axis=1).mean(), rel=5e-3)


@pytest.mark.parametrize(("num_slots", "num_ranks"), [(8, 8), (32, 8), (12, 8), (8, 1)])
@pytest.mark.parametrize("meets", [True, False])
def test_the_slowest_rank_is_that_of_simulated_steps(num_slots, num_ranks, meets):
    costs = np.random.default_rng(3).gamma(4.0, size=300)
    rounds = -(-num_slots // num_ranks)
    drawn = np.random.default_rng(4).choice(costs / costs.mean(), (20_000, rounds * num_ranks))
    drawn[:, num_slots:] = 0
    of_rounds = drawn.reshape(-1, rounds, num_ranks)
    simulated = of_rounds.max(axis=2).sum(axis=1) if meets else of_rounds.sum(axis=1).max(axis=1)
    expected = slowest_rank(list(costs), num_slots, num_ranks, meets_in_micro_batches=meets)
    assert expected == pytest.approx(simulated.mean(), rel=0.02)
    assert slowest_rank([], num_slots, num_ranks, meets_in_micro_batches=meets) == rounds


def test_only_what_computation_does_not_hide_counts():
    def timed(seconds: float, *, is_hidden: bool) -> tuple[Collective, float]:
        return Collective("all-gather", "forward pass", 1.0, 8, 10, is_hidden), seconds

    assert exposed_seconds([timed(2, is_hidden=False)], compute=9) == 2
    # The first of ten calls has nothing to hide behind.
    assert exposed_seconds([timed(2, is_hidden=True)], compute=9) == pytest.approx(0.2)
    assert exposed_seconds([timed(2, is_hidden=True)], compute=1) == pytest.approx(1.0)
    assert exposed_seconds([], compute=1) == 0


def test_the_command_prints_a_table(capsys, tmp_path, config):
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    result = run_command(capsys, "plan", "--config", path, "--gpu", "H200", "--scale", 1, 8)
    assert (result.code, result.err) == (0, "")
    heads, first, last = result.out.splitlines()[1:4]
    assert heads.split()[:4] == ["GPUs", "slots", "step", "audio"]
    assert [line.split()[0] for line in (first, last)] == ["1", "8"]
    assert first.split()[1] == last.split()[1] == "8"


def test_everything_is_there_as_json(found):
    tree = json.loads(json.dumps(found.to_json()))
    assert [row["num_gpus"] for row in tree["rows"]] == list(NUMBERS)
    assert tree["network"]["bandwidth"] == 400e9


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--scale", "8", "--gpu", "H200"], "`--scale` needs `--config`"),
        (["--scale", "8", "--config", "voxtral_mini_full"], "`--scale` needs `--gpu`"),
        (["--scale", "8", "--gpu", "H200", "--config", "voxtral_mini_offload"], "moves them through host memory"),
    ],
)
def test_mistakes_are_refused(capsys, options, sentence):
    assert sentence in run_command(capsys, "plan", *options).refusal()
