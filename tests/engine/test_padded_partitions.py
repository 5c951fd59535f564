"""What DeepSpeed fills up partitions with is no value of the model, whatever it is."""

from __future__ import annotations

import math
from pathlib import Path

from voxtral_dist.config import RunConfig
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.build import build_engine
from voxtral_dist.model.features import LogMel

from ranks import run_ranks
from runs import run_config


def _not_finite(world: World, config: RunConfig) -> tuple[int, list[str], list[str]]:
    """Number of values beyond parameters that are NaN, and what is found before and after a weight is NaN on rank 0."""
    engine = build_engine(config, LogMel.from_pretrained(config.model.path, world.device), world)
    partitions = {name: parameter.ds_tensor.detach() for name, parameter in engine._module.named_parameters()}
    sizes = {name: parameter.ds_numel for name, parameter in engine._module.named_parameters()}
    num_beyond = 0
    for name, partition in partitions.items():
        beyond = partition[max(0, sizes[name] - world.rank * partition.numel()) :]
        beyond.fill_(math.nan)
        num_beyond += beyond.numel()
    before = engine.not_finite()
    if world.is_first:
        next(iter(partitions.values()))[0] = math.nan
    return num_beyond, before, engine.not_finite()


def test_a_partition_is_finite_whatever_it_is_filled_up_with(tiny_model: Path, tmp_path: Path) -> None:
    config = run_config(tmp_path / "run", tiny_model, tmp_path, num_steps=3, stage=3)
    found = run_ranks(3, _not_finite, config)
    assert sum(num_beyond for num_beyond, _, _ in found) > 0
    assert [before for _, before, _ in found] == [[], [], []]
    assert [len(after) for _, _, after in found] == [1, 0, 0]
