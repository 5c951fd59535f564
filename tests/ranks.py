"""Real ranks for tests: processes that meet over gloo through a file, so that no port is raced for."""

from __future__ import annotations

import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.multiprocessing as multiprocessing

_TIMEOUT_SECONDS = 480


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(world, *arguments)` returns on each rank.

    `function` must be importable: defined at the top of a test module. A rank that raises fails the test with its
    traceback, and ends the others.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=_run_rank, args=(rank, world_size, Path(folder), function, arguments))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            return [_result_of(process, Path(folder) / f"result-{rank}") for rank, process in enumerate(processes)]
        finally:
            for process in processes:
                process.kill()
                process.join()


def _result_of(process: Any, path: Path) -> Any:
    process.join(_TIMEOUT_SECONDS)
    failures = sorted(path.parent.glob("failure-*"))
    assert not failures, failures[0].read_text()
    assert path.is_file(), f"a rank ended with exit code {process.exitcode} and no result"
    return pickle.loads(path.read_bytes())


def _run_rank(rank: int, world_size: int, folder: Path, function: Callable[..., Any], arguments: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "DS_ACCELERATOR": "cpu"}
    import torch
    import torch.distributed as dist

    from voxtral_dist.distributed.world import World

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(folder / "store"), world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=_TIMEOUT_SECONDS),
        )
        result = function(World(rank, world_size, rank, torch.device("cpu")), *arguments)
        (folder / f"result-{rank}.tmp").write_bytes(pickle.dumps(result))
        (folder / f"result-{rank}.tmp").rename(folder / f"result-{rank}")
        dist.destroy_process_group()
    except BaseException:
        (folder / f"failure-{rank}").write_text(traceback.format_exc())
        raise
