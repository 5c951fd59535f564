"""A run whose last rank fails while the others wait in C, started by a launcher: `failing_ranks.py --config FILE`."""

import os
import socket
import sys
import time

import torch
import torch.distributed as dist

import voxtral_dist.train
from voxtral_dist.cli.main import console
from voxtral_dist.config import RunConfig
from voxtral_dist.distributed.world import World
from voxtral_dist.errors import RankError
from voxtral_dist.training.signals import stop_signals


def train(_config: RunConfig, world: World, _allow_changed: object) -> int:
    """Stands for `voxtral_dist.train.train`."""
    with stop_signals():
        dist.all_reduce(torch.ones(1))
        if world.rank == world.size - 1:
            print(f"failed at {time.time():.1f}", flush=True)
            raise RankError(f"Rank {world.rank} cannot read the shard.")
        os.read(os.pipe()[0], 1)
    return 0


if __name__ == "__main__":
    if "HOST_NAME" in os.environ:
        socket.gethostname = lambda: os.environ["HOST_NAME"]
    voxtral_dist.train.train = train
    console(["train", *sys.argv[1:]])
