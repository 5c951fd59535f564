"""FSDP2 on any number of ranks trains as one plain process does on the whole batch, in float32, however it is set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from voxtral_dist.config import RunConfig
from voxtral_dist.distributed.world import World
from voxtral_dist.weights import load_voxtral

from ranks import run_ranks
from runs import run_config
from test_equations import NUM_STEPS, Curve, Weights, assert_same, train_plainly, train_sharded

CHECKPOINTED = {"activation_checkpointing": {"encoder": 1, "language_model": 2}, "loss_chunk_tokens": 3}
# Two windows at a time: micro-batches have one to eight, and differ between ranks, down to a silent one.
IN_PASSES = {"encoder_windows_per_pass": 2}
FROZEN = {"frozen": ("encoder",)}
# With fewer rows than there are ranks, some of which hold none of an adapter.
ADAPTERS = {"lora": {"rank": 2, "targets": {"language_model": ("q_proj", "down_proj"), "projector": ("linear_2",)}}}
DORA = {"lora": {**ADAPTERS["lora"], "use_dora": True, "trained_whole": ("encoder",)}}

# By the number of ranks and a name: settings of FSDP2, of the model, and what is trained.
VARIANTS: dict[tuple[int, str], tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    (1, "alone"): ({"cpu_offload": True}, IN_PASSES, {}),
    (1, "alone with adapters"): ({}, {}, ADAPTERS),
    (2, "as it is"): ({}, {}, {}),
    (2, "in passes and checkpointed"): ({"reshard_after_forward": False}, CHECKPOINTED | IN_PASSES, {}),
    (2, "offloaded replicas"): ({"ranks_per_replica": 1, "cpu_offload": True}, {}, {}),
    (2, "frozen encoder in passes"): ({}, CHECKPOINTED | IN_PASSES, FROZEN),
    (2, "magnitudes beside a whole encoder"): ({}, CHECKPOINTED | IN_PASSES, DORA),
    (3, "as it is"): ({}, CHECKPOINTED | IN_PASSES, {}),
    (3, "adapters"): ({}, IN_PASSES, ADAPTERS),
    (4, "replicas"): ({"ranks_per_replica": 2}, IN_PASSES, {}),
}


def variant(config: RunConfig, key: tuple[int, str]) -> RunConfig:
    engine, model, trainable = VARIANTS[key]
    tree = config.model_dump()
    changed = {"engine": {"fsdp2": engine}, "model": tree["model"] | model, "trainable": trainable}
    return RunConfig.model_validate(tree | changed)


def train_all(world: World, configs: list[RunConfig]) -> list[tuple[Curve, Weights]]:
    return [train_sharded(world, config) for config in configs]


@pytest.fixture(scope="module")
def config(tiny_model: Path, shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    # 5 slots: 2 and 3 ranks have unequal shares, so that one of them runs a micro-batch of weight zero.
    return run_config(tmp_path_factory.mktemp("run"), tiny_model, shard_folder, num_steps=NUM_STEPS, slots_per_step=5)


@pytest.mark.parametrize("world_size", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_fsdp2_equals_one_plain_process(config: RunConfig, world_size: int) -> None:
    keys = [key for key in VARIANTS if key[0] == world_size]
    # One start of processes for all: their imports take longer than their training.
    of_ranks = run_ranks(world_size, train_all, [variant(config, key) for key in keys])
    for number, (_, name) in enumerate(keys):
        trainable = variant(config, keys[number]).trainable
        expected = train_plainly(config, load_voxtral(config.model, trainable, config.seed))
        for results in of_ranks:
            assert_same(results[number], expected, name)
