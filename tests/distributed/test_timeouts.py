"""All process groups of a run have one timeout, ours, whoever made them."""

import os
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from voxtral_dist.config import RunConfig
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.build import build_engine
from voxtral_dist.model.features import LogMel

from ranks import run_ranks
from runs import ROOT, run_config

TIMEOUT = timedelta(minutes=7)


def _timeouts(world: World, config: RunConfig) -> list[timedelta]:
    """The timeouts of all groups after building the engine, and of DeepSpeed's before it reads weights."""
    world = replace(world, timeout=TIMEOUT)
    # The default of NCCL, which makes groups for GPUs.
    distributed_c10d.default_pg_timeout = timedelta(minutes=10)
    engine = build_engine(config, LogMel.from_pretrained(config.model.path, world.device), world)
    found = [_timeout(group) for group in distributed_c10d._world.pg_map]
    if config.engine.deepspeed is not None:
        from deepspeed.utils import groups

        assert engine.stage in (2, 3)
        found.append(_timeout(groups._get_data_parallel_group()))
    return found


def _timeout(group: dist.ProcessGroup) -> timedelta:
    return group._get_backend(torch.device("cpu")).options._timeout


@pytest.mark.parametrize(
    "engine",
    [
        {"deepspeed": ROOT / "ds_configs" / "zero2.json"},
        {"deepspeed": ROOT / "ds_configs" / "zero3.json"},
        {"fsdp2": {"ranks_per_replica": 1}},
    ],
)
def test_every_group_has_the_configured_timeout(
    engine: dict[str, Any], tiny_model: Path, shard_folder: Path, tmp_path: Path
):
    config = run_config(tmp_path / "run", tiny_model, shard_folder, num_steps=3, engine=engine)
    for found in run_ranks(2, _timeouts, config):
        assert len(found) >= 2
        assert set(found) == {TIMEOUT}


def test_the_first_group_has_the_configured_timeout() -> None:
    """In a process of its own: others may have made a group already."""
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch.distributed as dist
from test_timeouts import _timeout
from voxtral_dist.distributed.world import joined_world
from datetime import timedelta
with joined_world(timedelta(seconds=420)) as world:
    print(_timeout(dist.group.WORLD).total_seconds(), world.timeout.total_seconds())
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "420.0 420.0"
