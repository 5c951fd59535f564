"""Shared parts of all measured data paths: the request on the command line, the clock, and the tasks.

speed        core seconds for so many examples, from tars to collated batches, after a first batch that is not counted
exactness    an epoch that is stopped and resumed at some places: how many samples are missing and repeated, compared
             with the run that was not stopped; and in that run, compared with what the tars hold
stop         the states that a run leaves which is stopped at some places
first_batch  seconds from the start of the construction of a resumed loader to its first collated batch
prepare      conversion of the shards to the framework's own layout, before anything is measured
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

# Before numpy and torch are imported by the scripts: one thread for everything.
os.environ["OMP_NUM_THREADS"] = "1"


@dataclass(frozen=True)
class Request:
    """Request of the benchmark to a script, as JSON in its first argument."""

    task: str
    shards: str
    model: str
    prepared: str = ""
    batch_size: int = 8
    num_examples: int = 0
    mean_seconds: float = 0.0
    with_features: bool = False
    world_size: int = 2
    other_world_sizes: Sequence[int] = ()
    percents: Sequence[int] = ()
    states: str = ""

    @property
    def tars(self) -> list[str]:
        """The shards in their order."""
        return sorted(str(path) for path in Path(self.shards).glob("*.tar"))


@dataclass(frozen=True)
class Stopped:
    """Point at which a run of `len(states)` ranks was stopped: after `step` batches of every rank."""

    step: int
    states: list[Any]
    batches_per_epoch: list[int]


@dataclass(frozen=True)
class Place:
    """One rank, where it begins, and whether its stream ends with the epoch."""

    rank: int
    world_size: int
    resumed_from: Stopped | None = None
    repeats: bool = False


class CannotDoError(Exception):
    """The framework cannot do this; the message gives the reason."""


class Stream(Protocol):
    """The batches of one rank, before audio is decoded."""

    def __iter__(self) -> Iterator[Any]:
        """One batch at a time, of whatever the collator takes."""

    def state(self) -> Any:
        """State that a checkpoint would store now; picklable."""


class DataPath(Protocol):
    """A framework's data path from shards to batches.

    examples_per_batch: of what `open` gives, about.
    """

    examples_per_batch: int

    def prepare(self) -> dict[str, Any]:
        """Convert the shards where the framework needs it."""

    def open(self, place: Place) -> Stream:
        """The stream of a rank.

        Raises:
            CannotDoError: it cannot begin there.
        """

    def collate(self, batch: Any) -> tuple[int, float]:
        """Make the tensors of a training step. Returns the number of examples and their audio in seconds."""

    def keys(self, batch: Any) -> list[str]:
        """The keys of the utterances of a batch."""


def answer(path_class: Callable[[Request], DataPath]) -> None:
    """Run the requested task and print its answer as the last line of the output, in JSON."""
    request = Request(**json.loads(sys.argv[1]))
    tasks = {
        "prepare": _prepare,
        "speed": _speed,
        "exactness": _exactness,
        "stop": _stop,
        "first_batch": _first_batch,
    }
    print(json.dumps(tasks[request.task](request, path_class(request))), flush=True)


def _prepare(_request: Request, path: DataPath) -> dict[str, Any]:
    return path.prepare()


def _speed(request: Request, path: DataPath) -> dict[str, Any]:
    batches = iter(path.open(Place(rank=0, world_size=1, repeats=True)))
    path.collate(next(batches))
    core_seconds, wall_seconds = _core_seconds(), time.perf_counter()
    num_examples, audio_seconds = 0, 0.0
    while num_examples < request.num_examples:
        in_batch, seconds = path.collate(next(batches))
        num_examples, audio_seconds = num_examples + in_batch, audio_seconds + seconds
    core_seconds = _core_seconds() - core_seconds
    return {
        "audio_seconds_per_core_second": audio_seconds / core_seconds,
        "core_seconds": core_seconds,
        "wall_seconds": time.perf_counter() - wall_seconds,
        "audio_seconds": audio_seconds,
        "num_examples": num_examples,
    }


def _core_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _exactness(request: Request, path: DataPath) -> dict[str, Any]:
    stored = Counter(sample_names(request.tars))
    ranks = range(request.world_size)
    whole = [_delivered(path, path.open(Place(rank, request.world_size))) for rank in ranks]
    num_steps = min(len(batches) for batches in whole)
    result: dict[str, Any] = {
        "num_samples": len(stored),
        "not_stopped": _differences(stored, whole),
        "stopped_at_percent": {},
    }
    for percent in request.percents:
        step = round(num_steps * percent / 100)
        stopped, before = _stopped_at(step, path, [len(batches) for batches in whole])
        row = {}
        for world_size in (request.world_size, *request.other_world_sizes):
            row[str(world_size)] = _resume(path, whole, before, stopped, world_size)
        result["stopped_at_percent"][str(percent)] = row
    return result


def _stopped_at(step: int, path: DataPath, batches_per_epoch: list[int]) -> tuple[Stopped, list[list[list[str]]]]:
    """The states of all ranks and the keys of the batches that they had."""
    states, before = [], []
    for rank in range(len(batches_per_epoch)):
        stream = path.open(Place(rank, len(batches_per_epoch)))
        before.append([path.keys(batch) for batch in islice(stream, step)])
        states.append(stream.state())
    return Stopped(step, states, batches_per_epoch), before


def _resume(
    path: DataPath,
    whole: list[list[list[str]]],
    before: list[list[list[str]]],
    stopped: Stopped,
    world_size: int,
) -> dict[str, Any]:
    try:
        after = [_delivered(path, path.open(Place(rank, world_size, stopped))) for rank in range(world_size)]
    except CannotDoError as error:
        return {"cannot": str(error)}
    result = _differences(_samples(whole), before + after)
    if len(before) == world_size:
        joined = [early + late for early, late in zip(before, after, strict=True)]
        result["same_batches_as_not_stopped"] = joined == whole
    return result


def _delivered(path: DataPath, stream: Stream) -> list[list[str]]:
    return [path.keys(batch) for batch in stream]


def _differences(wanted: Counter[str], parts: list[list[list[str]]]) -> dict[str, Any]:
    """Numbers of missing and repeated utterances over all ranks."""
    got = _samples(parts)
    return {"num_missing": (wanted - got).total(), "num_repeated": (got - wanted).total()}


def _samples(parts: list[list[list[str]]]) -> Counter[str]:
    return Counter(key for batches in parts for batch in batches for key in batch)


def _stop(request: Request, path: DataPath) -> dict[str, Any]:
    num_samples = sum(1 for _ in sample_names(request.tars))
    steps_per_epoch = num_samples // (request.world_size * path.examples_per_batch)
    places = [(percent, round(steps_per_epoch * percent / 100)) for percent in sorted(request.percents)]
    states: dict[int, list[Any]] = {percent: [] for percent, _ in places}
    for rank in range(request.world_size):
        stream, taken = path.open(Place(rank, request.world_size)), 0
        batches = iter(stream)
        for percent, step in places:
            for _ in islice(batches, step - taken):
                pass
            states[percent].append(stream.state())
            taken = step
    for percent, step in places:
        stopped = Stopped(step, states[percent], [steps_per_epoch] * request.world_size)
        (Path(request.states) / f"{percent}.pickle").write_bytes(pickle.dumps(stopped))
    return {"steps": dict(places)}


def _first_batch(request: Request, path: DataPath) -> dict[str, Any]:
    [percent] = request.percents
    # Written by the `stop` task of the same benchmark.
    stopped = pickle.loads((Path(request.states) / f"{percent}.pickle").read_bytes())
    started = time.perf_counter()
    try:
        stream = path.open(Place(0, request.world_size, stopped))
    except CannotDoError as error:
        return {"cannot": str(error)}
    path.collate(next(iter(stream)))
    return {"seconds": time.perf_counter() - started, "step": stopped.step}


def sample_names(tars: Sequence[str]) -> Iterator[str]:
    """The keys in the order of the tars."""
    for tar_path in tars:
        with tarfile.open(tar_path) as tar:
            yield from (name.rpartition(".")[0] for name in tar.getnames() if name.endswith(".json"))
