"""megatron-energon: its WebDataset loader with a task encoder, and VoxtralProcessor.

Its preparation writes indexes beside the tars, so it gets links to them in a folder of its own. Resuming is done by
`save_state_rank` and `restore_state_rank` of its savable loader. For another number of ranks it has `energon checkpoint
redist`, which deals out the states of workers: so each of the two ranks that are stopped has two workers, and four
ranks go on with one each. Its training streams have no end; an epoch is counted here as the batches that hold as many
samples as there are.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    Sample,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_savable_loader,
    get_train_dataset,
    stateless,
)

from measure import CannotDoError, Place, Stopped, answer, sample_names
from voxtral_examples import SHUFFLE_BUFFER, Clip, VoxtralPath, clip_of_members

WORKERS_OF_ALL_RANKS = 4


@edataclass
class Utterance(Sample):
    """One utterance in energon's form."""

    clip: Clip


@stateless
def cook(sample: dict[str, Any]) -> Utterance:
    """The raw members as an utterance."""
    clip = clip_of_members(sample["__key__"].rpartition("/")[2], sample["flac"], sample["json"])
    return Utterance(**basic_sample_keys(sample), clip=clip)


class ClipEncoder(DefaultTaskEncoder):
    """Batches are lists: audio is decoded by what all rivals share."""

    decoder = None
    cookers = (Cooker(cook),)

    @stateless
    def batch(self, samples: list[Utterance]) -> list[Clip]:
        """The clips alone."""
        return [sample.clip for sample in samples]

    @stateless
    def encode_batch(self, batch: list[Clip]) -> list[Clip]:
        """Return the batch unchanged."""
        return batch


class EnergonPath(VoxtralPath):
    """Energon's train dataset and savable loader."""

    _loader: Any = None

    def prepare(self) -> dict[str, Any]:
        """Link the tars into a folder and index them by `energon prepare`."""
        folder = Path(self.request.prepared)
        for tar in self.request.tars:
            (folder / Path(tar).name).symlink_to(Path(tar).resolve())
        options = ("--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset", "--no-progress")
        _energon("prepare", *options, str(folder))
        return {}

    def open(self, place: Place) -> _Batches:
        """The batches of a rank."""
        if place.resumed_from is not None:
            _check_divisible(place.resumed_from, place.world_size)
        self._end_workers()
        # The speed of one process is measured without workers, as for the others.
        num_workers = 0 if place.repeats else WORKERS_OF_ALL_RANKS // place.world_size
        workers = WorkerConfig(rank=place.rank, world_size=place.world_size, num_workers=num_workers)
        dataset = get_train_dataset(
            self.request.prepared,
            worker_config=workers,
            batch_size=self.request.batch_size,
            shuffle_buffer_size=SHUFFLE_BUFFER,
            max_samples_per_sequence=None,
            task_encoder=ClipEncoder(),
        )
        self._loader = loader = get_savable_loader(dataset)
        if place.resumed_from is None:
            return _Batches(loader, None if place.repeats else self._batches_per_epoch(place.world_size))
        loader.restore_state_rank(_state_of_rank(place.resumed_from, place.rank, place.world_size))
        return _Batches(loader, _batches_left(place.resumed_from, place.rank, num_workers))

    def _batches_per_epoch(self, world_size: int) -> int:
        num_samples = sum(1 for _ in sample_names(self.request.tars))
        return -(-num_samples // (world_size * self.request.batch_size))

    def _end_workers(self) -> None:
        # Workers of the next loader are forks that inherit the pipes of the last one, and its workers then never end.
        if self._loader is not None and self._loader._iterator is not None:
            self._loader._iterator._shutdown_workers()


class _Batches:
    def __init__(self, loader: Any, num_batches: int | None) -> None:
        self._loader = loader
        self._num_batches = num_batches
        self._has_begun = False

    def __iter__(self) -> Iterator[list[Clip]]:
        for batch in islice(self._loader, self._num_batches):
            self._has_begun = True
            yield batch

    def state(self) -> Any:
        """The library's own state; None before the first batch, when asking for it would block forever."""
        return self._loader.save_state_rank() if self._has_begun else None


def _batches_left(stopped: Stopped, rank: int, num_workers: int) -> int:
    """Number of batches left in the epoch: workers take turns and are numbered over all ranks."""
    workers_then = WORKERS_OF_ALL_RANKS // len(stopped.states)
    left = 0
    for number in range(rank * num_workers, (rank + 1) * num_workers):
        rank_then, worker = divmod(number, workers_then)
        left += len(range(stopped.batches_per_epoch[rank_then])[worker::workers_then])
        left -= len(range(stopped.step)[worker::workers_then])
    return left


def _check_divisible(stopped: Stopped, world_size: int) -> None:
    if len(stopped.states) != world_size and WORKERS_OF_ALL_RANKS % world_size:
        raise CannotDoError(
            f"`energon checkpoint redist` deals out whole workers: the {WORKERS_OF_ALL_RANKS} workers of all ranks are "
            f"not divisible by {world_size} ranks"
        )


def _state_of_rank(stopped: Stopped, rank: int, world_size: int) -> Any:
    if len(stopped.states) == world_size:
        return stopped.states[rank]
    return None if stopped.states[0] is None else _redistributed(stopped, world_size)[rank]


def _redistributed(stopped: Stopped, world_size: int) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"state-{rank}.pt" for rank in range(len(stopped.states))]
        for file, state in zip(files, stopped.states, strict=True):
            torch.save(state, file)
        out = Path(folder) / "redistributed"
        out.mkdir()
        _energon("checkpoint", "redist", "--new-world-size", str(world_size), *map(str, files), str(out))
        return [torch.load(out / f"state-{rank}.pt", weights_only=False) for rank in range(world_size)]


def _energon(*arguments: str) -> None:
    command = [str(Path(sys.executable).parent / "energon"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotDoError(f"`energon {arguments[0]}` failed: {(done.stderr or done.stdout).strip()[-500:]}")


if __name__ == "__main__":
    answer(EnergonPath)
