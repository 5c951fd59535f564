"""`activation_checkpointing: auto`: as little recomputation as fits, the same on all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from voxtral_dist.config import ActivationCheckpointingConfig, RunConfig, load_config
from voxtral_dist.distributed.world import World
from voxtral_dist.estimate import checkpointing
from voxtral_dist.estimate.checkpointing import checkpointing_for, choose_checkpointing, with_chosen_checkpointing
from voxtral_dist.estimate.estimate import estimate_run
from voxtral_dist.estimate.estimator import Estimator, Machine
from voxtral_dist.estimate.sharding import configured_sharding
from voxtral_dist.estimate.workload import largest_workload

ROOT = Path(__file__).resolve().parents[2]
GIGABYTE = 10**9
CARDS = (24, 40, 48, 80)


@pytest.fixture(scope="module")
def run() -> RunConfig:
    auto = ["model.activation_checkpointing=auto", "evaluation.test_sets={}"]
    return load_config(ROOT / "launch" / "recipes" / "voxtral_mini_fsdp2.yaml", auto)


@pytest.fixture(scope="module")
def estimator(run: RunConfig) -> Estimator:
    return Estimator(run, Machine(num_gpus=8), largest_workload)


def computed_flops(estimator: Estimator, choice: ActivationCheckpointingConfig) -> float:
    (shape,) = estimator.workload.candidates
    return checkpointing._computed_flops(estimator.with_config(checkpointing._with(estimator.config, choice)), shape)


def test_more_memory_recomputes_less_and_what_is_chosen_fits(run: RunConfig, estimator: Estimator) -> None:
    sharding = configured_sharding(run.engine, 8)
    chosen = [choose_checkpointing(estimator, sharding, card * GIGABYTE) for card in CARDS]
    costs = [computed_flops(estimator, one.checkpointing) for one in chosen]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) >= 3
    for card, one in zip(CARDS, chosen, strict=True):
        assert one.device_bytes is not None
        assert one.device_bytes <= 0.9 * card * GIGABYTE
    assert chosen[-1].checkpointing.model_dump() == {"encoder": 0, "language_model": 0}
    # What would recompute a little less does not fit.
    cheaper = [one for one in checkpointing._CHOICES if computed_flops(estimator, one) < costs[1]]
    (shape,) = estimator.workload.candidates
    for one in cheaper:
        variant = estimator.with_config(checkpointing._with(run, one))
        assert variant.estimate(sharding, shape).device_bytes > 0.9 * CARDS[1] * GIGABYTE


def test_where_nothing_fits_all_blocks_are_recomputed(run: RunConfig, estimator: Estimator) -> None:
    chosen = choose_checkpointing(estimator, configured_sharding(run.engine, 8), GIGABYTE)
    assert chosen.checkpointing.model_dump() == {"encoder": 1, "language_model": 1}
    assert "more than 0.900 GB" in chosen.line


def test_a_frozen_encoder_is_not_recomputed(run: RunConfig) -> None:
    frozen = RunConfig.model_validate(run.model_dump() | {"trainable": {"frozen": ["encoder", "projector"]}})
    config, _ = checkpointing_for(frozen, Machine(num_gpus=8, gpu_memory=24 * GIGABYTE))
    assert config.model.checkpointing.encoder == 0
    assert config.model.checkpointing.language_model > 0


def test_the_smallest_gpu_of_all_ranks_decides(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        total_memory = 80 * GIGABYTE

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(checkpointing, "max_over_ranks", lambda values, world: [max(*values, -40 * GIGABYTE)])
    chosen, choice = with_chosen_checkpointing(run, World(0, 8, 0, torch.device("cuda", 0)))
    expected, planned = checkpointing_for(run, Machine(num_gpus=8, gpu_memory=40 * GIGABYTE))
    assert chosen == expected != run
    assert choice == planned


def test_nothing_is_recomputed_on_cpus_and_where_memory_is_unknown(run: RunConfig) -> None:
    world = World(0, 1, 0, torch.device("cpu"))
    for config, choice in (with_chosen_checkpointing(run, world), checkpointing_for(run, Machine(num_gpus=8))):
        assert config.model.activation_checkpointing == run.model.checkpointing
        assert choice is not None
        assert "memory of GPUs is not known" in choice.line
    explicit = config.model_copy(update={"engine": run.engine})
    assert with_chosen_checkpointing(explicit, world) == (explicit, None)


def test_plan_prints_the_choice(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    estimate = estimate_run(run, Machine(num_gpus=8, gpu_memory=40 * GIGABYTE))
    assert estimate.memory.configured.fits
    assert any("every block of the encoder and every 2nd block of the language" in line for line in estimate.lines())
    assert estimate.to_json()["checkpointing"]["checkpointing"] == {"encoder": 1, "language_model": 2}


@pytest.mark.parametrize(
    ("model", "data", "sentence"),
    [
        ({}, {"max_examples": 4, "max_windows": None, "max_duration_seconds": None}, "needs a bound of micro-batches"),
        ({"activation_offloading": True}, {}, "`model.activation_checkpointing` is auto instead"),
    ],
)
def test_auto_is_refused_where_it_cannot_be_chosen(
    run: RunConfig, model: dict[str, Any], data: dict[str, Any], sentence: str
) -> None:
    tree = run.model_dump()
    tree["model"] |= model
    tree["train_data"] |= data
    with pytest.raises(ValueError, match=sentence):
        RunConfig.model_validate(tree)
