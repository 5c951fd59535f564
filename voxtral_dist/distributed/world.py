"""The ranks of a run as a value: this process's rank, the number of ranks, and this rank's device."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]  # public classes all the same

from voxtral_dist.distributed.data_workers import lost_workers_as_message
from voxtral_dist.distributed.devices import refuse_unsupported_gpu
from voxtral_dist.distributed.failures import newest_end, shared_failures
from voxtral_dist.distributed.heartbeats import lost_peers_as_message
from voxtral_dist.distributed.launchers import adopt_launched_place, watch_launcher
from voxtral_dist.distributed.nccl import set_watchdog_limits
from voxtral_dist.distributed.process_settings import limit_threads, set_allocator_defaults
from voxtral_dist.distributed.store import meet, wait_for_ranks
from voxtral_dist.errors import LostPeerError, RankError, UserError, WriteError, first_line, write_reason
from voxtral_dist.files import DISK_ERRORS
from voxtral_dist.output.counting import counted

# Of all process groups, unless `distributed.timeout_seconds` says otherwise.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
# Within which all ranks must come, unless `distributed.start_timeout_seconds` says otherwise.
START_TIMEOUT = timedelta(minutes=10)
# Of the store that ranks meet by to say that their arguments are refused; rank 0 may still be importing torch.
_MEETING_TIMEOUT = timedelta(minutes=1)


# The counter of ranks that have finished, and the pause between two looks at it.
_NUM_FINISHED, _POLL_SECONDS = "finished", 0.05


@dataclass(frozen=True)
class World:
    """The position of this process among all processes of the run; `timeout` is the limit of their collectives."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    timeout: timedelta = COLLECTIVE_TIMEOUT

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes everything that is written only once."""
        return self.rank == 0


def alone(device: str | None = None) -> World:
    """A world of one process, without a process group."""
    return World(rank=0, size=1, local_rank=0, device=torch.device(device) if device else _device_of(0))


@contextmanager
def joined_world(timeout: timedelta = COLLECTIVE_TIMEOUT, start_timeout: timedelta = START_TIMEOUT) -> Iterator[World]:
    """Join the ranks that the launcher started, by `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR`, `MASTER_PORT`.

    Without these variables, the process is a world of size 1; engines still get a process group. The group is destroyed
    when the block ends. After an error in a larger world it is kept, because its destructors may wait for other ranks;
    these end within seconds with the error's message, see `FailureWatch`.

    Args:
        timeout: limit of collectives.
        start_timeout: limit of waiting for all ranks to come.

    Raises:
        UserError: the variables do not fit this node.
        LostPeerError: a rank did not come.
        LostWorkerError: a data worker of this rank was killed inside the block.
        RankError: this rank's GPU ran out of memory inside the block.
        WriteError: a disk was full or read-only inside the block.
    """
    with _default_place():
        yield from _joined(timeout, start_timeout)


def _joined(timeout: timedelta, start_timeout: timedelta) -> Iterator[World]:
    rank, size, local_rank, port = _launched_place()
    limit_threads(ranks_on_node(size))
    watch_launcher()
    store = meet(os.environ["MASTER_ADDR"], port, rank, size, start_timeout) if size > 1 else HashStore()
    with (
        shared_failures(store, rank, size, timeout.total_seconds(), _next_on_node(rank, local_rank, size)),
        _out_of_memory_as_message(rank),
        _full_disk_as_message(rank),
        lost_workers_as_message(rank),
        lost_peers_as_message(PrefixStore("failures", store), rank, size, timeout),
    ):
        device = _device_of(local_rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            refuse_unsupported_gpu(device)
            set_watchdog_limits(timeout)
        if size > 1:
            wait_for_ranks(store, rank, size, start_timeout)
            store.set_timeout(timeout)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("default_pg", store),
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
        is_group_kept = size > 1
        try:
            yield World(rank, size, local_rank, device, timeout)
            _finish_together(store, size, device, timeout)
            is_group_kept = False
        finally:
            if not is_group_kept:
                _destroy_group()


def end_with_all_ranks(error: UserError | None) -> bool:
    """Wait until each rank of the launcher has printed what it prints, because launchers end the others with the first.

    A process that has not joined the other ranks, because its arguments are refused, tells them so.

    Args:
        error: what this rank ends with, and prints before this if it prints it; None if it only stops.

    Returns:
        Whether all have printed; false if a rank is killed, cannot answer, or is some seconds late.
    """
    end = newest_end()
    # After a peer was lost, there is nobody to meet.
    if end is None and error is not None and not isinstance(error, LostPeerError):
        with suppress(UserError, RuntimeError), _default_place():
            rank, size, _, port = _launched_place()
            with shared_failures(meet(os.environ["MASTER_ADDR"], port, rank, size, _MEETING_TIMEOUT), rank, size):
                raise error
        end = newest_end()
    return error is None if end is None else end.wait()


def _launched_place() -> tuple[int, int, int, int]:
    """This process's rank, the number of ranks, its local rank and the store's port, by the launcher's variables.

    Raises:
        UserError: a variable is no number, or there are several processes without ranks.
    """
    rank, size, local_rank, port = (_integer(name, default) for name, default in _PLACE.items())
    return rank, size, local_rank, port


@contextmanager
def _default_place() -> Iterator[None]:
    """The variables of a single process, which DeepSpeed reads too, until the block ends.

    Those that were not set are removed, because Hugging Face's Trainer, for example, takes them for a launcher's.
    """
    adopt_launched_place()
    defaults = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500" if "RANK" in os.environ else "0", "LOCAL_RANK": "0"}
    missing = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


@contextmanager
def _out_of_memory_as_message(rank: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RankError(
            f"Rank {rank} ran out of GPU memory ({out_of_memory_reason(error)}): in training, use smaller "
            "micro-batches and more `train_data.slots_per_step`; in decoding, lower `--batch-size`. "
            "`voxtral-dist plan` estimates the memory of a run."
        ) from error


@contextmanager
def _full_disk_as_message(rank: int) -> Iterator[None]:
    """The message of a disk that is full or read-only, whoever wrote there: libraries keep caches too."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = f" to {error.filename}" if error.filename else ""
        raise WriteError(f"Rank {rank} cannot write{where}: {write_reason(error)}. Fix that, and rerun.") from error


def set_timeouts(timeout: timedelta) -> None:
    """Give every process group a timeout: DeepSpeed and device meshes make theirs with torch's default."""
    # torch 2.14 has made its private function public.
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    for group in dist.distributed_c10d._world.pg_map:
        set_timeout(timeout, group)


def _finish_together(store: Store, size: int, device: torch.device, timeout: timedelta) -> None:
    """Wait until no rank takes part in a collective any more.

    Destroying a group aborts what is under way in it, and what NCCL aborts in the middle of a transfer has taken nodes
    out of service. A rank that fails instead ends this process by the failure watch.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    deadline = time.monotonic() + timeout.total_seconds()
    store.add(_NUM_FINISHED, 1)
    while store.add(_NUM_FINISHED, 0) < size and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _destroy_group() -> None:
    """Destroy the process group so that this process can make another one, in a notebook for example."""
    # DeepSpeed, where it is in use, holds groups that only its own function releases.
    deepspeed = sys.modules.get("deepspeed.comm")
    if deepspeed is not None and deepspeed.is_initialized():
        deepspeed.destroy_process_group()
    else:
        dist.destroy_process_group()


def out_of_memory_reason(error: torch.OutOfMemoryError) -> str:
    """The part of torch's message that says how much was requested and is free, without its advice on allocators."""
    return first_line(error).partition(" Including")[0].rstrip(".")


_PLACE = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": 29500}


def ranks_on_node(world_size: int) -> int:
    """Number of ranks on this node; DeepSpeed's launcher and torchrun set it by different variables."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or world_size)


def _next_on_node(rank: int, local_rank: int, size: int) -> int:
    """The rank after this one among those of its node; after the last one the first."""
    return min(size - 1, rank - local_rank + (local_rank + 1) % ranks_on_node(size))


def _integer(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise UserError(f"The environment variable {name} must be a whole number from 0, but is {text!r} instead.")
    return int(text)


def _device_of(local_rank: int) -> torch.device:
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"This node has {counted(torch.cuda.device_count(), 'GPU')}, but a process with local rank {local_rank} "
            "was started: start at most one process per GPU (`deepspeed --num_gpus`)."
        )
    set_allocator_defaults()
    return torch.device("cuda", local_rank)
