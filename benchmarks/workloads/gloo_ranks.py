"""Ranks of a real run on CPUs, each a process of its own, forked by a server that has only imported packages."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from voxtral_dist.distributed.world import World


def run_ranks(
    num_ranks: int,
    target: Callable[..., object],
    *arguments: Any,
    preloaded: Sequence[str] = ("voxtral_dist.train",),
    limit_seconds: float,
) -> None:
    """Run `target(rank, *arguments)` on each rank to its end.

    Args:
        num_ranks: of the run.
        target: the program of a rank, at the top of a module.
        *arguments: of the program, after the rank.
        preloaded: modules that the server imports.
        limit_seconds: how long a rank may take.

    Raises:
        RuntimeError: a rank failed or took longer; then all are killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preloaded))
    ranks = [context.Process(target=target, args=(rank, *arguments)) for rank in range(num_ranks)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(limit_seconds)
    if any(rank.exitcode != 0 for rank in ranks):
        for rank in ranks:
            rank.kill()
        raise RuntimeError(f"ranks ended with the exit codes {[rank.exitcode for rank in ranks]}")


def join_ranks(rank: int, num_ranks: int, folder: Path) -> World:
    """Join the other ranks by gloo, through a file in an empty folder, with one thread for computation."""
    import torch.distributed as dist

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    return World(rank, num_ranks, rank, torch.device("cpu"))
