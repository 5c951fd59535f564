"""What `voxtral-dist plan` promises of evaluations is what they do: the same memory, the same decision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from voxtral_dist.config import RunConfig
from voxtral_dist.distributed.world import World
from voxtral_dist.estimate.estimator import Estimator, Machine
from voxtral_dist.estimate.sharding import Fsdp2Sharding, Sharding, ZeroSharding
from voxtral_dist.evaluation import decoding_weights as decoding_weights_module
from voxtral_dist.evaluation.building import build_test_sets
from voxtral_dist.evaluation.decoding_weights import decoding_weights
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.train import _build_evaluator

from runs import run_config

WORLD = World(0, 1, 0, torch.device("cpu"))
NUM_RANKS = 4


class _Engine:
    """Stands for an engine that shards a model of this many bytes."""

    def __init__(self, copy_bytes: int) -> None:
        self._copy_bytes = copy_bytes

    def full_weights_bytes(self) -> int:
        return self._copy_bytes

    @contextmanager
    def full_weights(self) -> Iterator[nn.Module]:
        yield nn.Identity()

    sharded_weights = full_weights


def config_of(folder: Path, model: Path, shards: Path, **evaluation: Any) -> RunConfig:
    test_sets = {"speech": {"shards": str(shards)}, "again": {"shards": str(shards), "max_utterances": 3}}
    return run_config(folder, model, shards, num_steps=3, evaluation={"test_sets": test_sets, **evaluation})


@pytest.mark.parametrize("evaluation", [{}, {"num_beams": 3, "batch_size": 5}, {"measures_loss": False}], ids=str)
def test_the_estimate_of_decoding_is_that_of_the_evaluator(
    tiny_model: Path, shard_folder: Path, prompts: VoxtralPrompts, tmp_path: Path, evaluation: dict[str, Any]
) -> None:
    config = config_of(tmp_path, tiny_model, shard_folder, **evaluation)
    estimator = Estimator(config, Machine(device="cpu"))
    assert estimator.workload.evaluation.source == "the largest batch of the test sets"
    test_sets = build_test_sets(config.evaluation, prompts, config.train_data.target_text)
    evaluator = _build_evaluator(config, 1, None, prompts, None, test_sets, None, WORLD)
    assert estimator.decoding_bytes == evaluator.decoding_bytes > 0


@pytest.mark.parametrize("weights", ["auto", "gathered", "sharded"])
@pytest.mark.parametrize("sharding", [ZeroSharding(3), Fsdp2Sharding()], ids=lambda sharding: sharding.name)
def test_the_estimate_gathers_weights_where_an_evaluation_does(
    tiny_model: Path,
    shard_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sharding: Sharding,
    weights: str,
) -> None:
    config = config_of(tmp_path, tiny_model, shard_folder, weights=weights)

    def estimator_for(rank_memory: int | None) -> Estimator:
        return Estimator(config, Machine(num_gpus=NUM_RANKS, gpu_memory=rank_memory))

    estimator = estimator_for(None)
    _, found = estimator.largest(sharding)
    assert found.gathers_weights == (weights != "sharded"), "without a limit there is room"
    kinds = found.phases[-1].device
    in_use = sum(kinds.values()) - kinds["gathered weights"] - kinds["decoding"]
    copy_bytes = sum(one.numel() * one.element_size() for one in estimator.model.parameters())
    needed = copy_bytes + estimator.decoding_bytes

    decisions = []
    for free in (0.5 * needed, needed, 1.1 * needed, 1.12 * needed, 2 * needed):
        limited = estimator_for(round(in_use + free))
        estimated = limited.largest(sharding)[1].gathers_weights
        monkeypatch.setattr(decoding_weights_module, "free_memory_bytes", lambda *_, free=free: round(free))
        with decoding_weights(_Engine(copy_bytes), config.evaluation, estimator.decoding_bytes, WORLD) as (_, lock, _):
            assert estimated == (not lock), free / needed
        decisions.append(estimated)
    assert decisions == ([False] * 3 + [True] * 2 if weights == "auto" else [weights == "gathered"] * 5)
