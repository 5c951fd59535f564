"""The files of one checkpoint.

    checkpoints/step-0000100/
        state-RRRRR-PPPPP.safetensors   layout "whole": full float32 tensors, in files of limited size of each rank;
                                        a weight is called NAME, its moments NAME//exp_avg and NAME//exp_avg_sq, and
                                        its moving average, if the run has any, NAME//ema
        __R_0.distcp, .metadata         layout "dcp": the same tensors in partitions, from `DistributedCheckpointing`
        config.yaml                     the run's configuration
    complete.json                   progress, identity of data and model, sizes and checksums of the other files;
                                    written last

Both layouts can be read by any engine on any number of ranks. Frozen weights are not stored, and neither is random
state: the order of the data, augmentation and dropout are functions of (seed, step, slot).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from voxtral_dist.checkpoints.complete import COMPLETE, METADATA, CompleteCheckpoint, StoredFile
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.ema import average_name
from voxtral_dist.engine.engine import DistributedCheckpointing, Engine, ParameterState
from voxtral_dist.engine.fsdp2.dcp_files import read_full, stored_moments
from voxtral_dist.engine.host_buffers import HostBuffers
from voxtral_dist.errors import write_reason
from voxtral_dist.model.saving import save_tensors

_PARTITIONS = "dcp"

# Tensors that a rank collects on the CPU before it writes them to a file.
FILE_BYTES = 2 * 2**30


@dataclass(frozen=True)
class WrittenPart:
    """What one rank wrote.

    files: its files by name. tensors: the file of each of its tensors, in the layout `whole`. results: what
    `PlannedPartitions` wrote, in the layout `dcp`. failure: why they could not all be written; None if they were.
    """

    files: dict[str, StoredFile] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    results: list[Any] = field(default_factory=list)
    failure: str | None = None


class HeldStates(Protocol):
    """This rank's part of the trained weights and their moments, in one of the two layouts."""

    @property
    def layout(self) -> Literal["whole", "dcp"]:
        """The layout, as in `complete.json`."""

    def write(self) -> WrittenPart:
        """Write it. A rank that cannot says why, and does not raise."""

    def finish(self, parts: Sequence[WrittenPart]) -> dict[str, StoredFile]:
        """Write what all parts together need, on rank 0; its files by name."""


def hold_states(engine: Engine, folder: Path, world: World, buffers: HostBuffers | None) -> HeldStates:
    """Prepare the writing of an engine's state into a folder; all ranks call it together.

    With buffers, the state is copied to them, and each rank may write its part whenever it likes, in any thread.
    Without, all ranks must write together, before the engine's state changes.
    """
    if isinstance(engine, DistributedCheckpointing):
        return _HeldPartitions(engine.partitions(), folder, world, buffers)
    return _HeldParameters(engine, folder, world, buffers)


def held_bytes(engine: Engine, world: World) -> int:
    """Host memory for a copy of this rank's part, in bytes; an upper bound where parameters are written whole."""
    if isinstance(engine, DistributedCheckpointing):
        from voxtral_dist.engine.fsdp2.sharding import local_part

        return sum(local_part(one).nbytes for one in engine.partitions().values())
    num_values = sum(math.prod(shape) for shape in engine.parameter_shapes().values())
    # A weight, two moments and an average in float32; a rank may write one parameter more than another.
    return 16 * num_values // world.size


class _HeldParameters:
    layout: Literal["whole"] = "whole"

    def __init__(self, engine: Engine, folder: Path, world: World, buffers: HostBuffers | None) -> None:
        if buffers is None:
            self._states = engine.parameter_states()
        else:
            self._states = iter(list(engine.parameter_states(buffers.copy)))
            buffers.wait()
        self._writer = _StateWriter(folder, world.rank)
        self._folder = folder

    def write(self) -> WrittenPart:
        tensors = self._writer.write(self._states)
        return _part(self._folder, {*tensors.values()}, self._writer.failure, tensors=tensors)

    def finish(self, parts: Sequence[WrittenPart]) -> dict[str, StoredFile]:
        return {}


class _HeldPartitions:
    layout: Literal["dcp"] = "dcp"

    def __init__(self, partitions: dict[str, Tensor], folder: Path, world: World, buffers: HostBuffers | None) -> None:
        from voxtral_dist.engine.fsdp2.dcp_writing import PlannedPartitions

        self._planned = PlannedPartitions(partitions, folder, world, buffers)
        self._folder = folder
        self._rank = world.rank

    def write(self) -> WrittenPart:
        try:
            results = self._planned.write()
        except torch.OutOfMemoryError:
            raise
        except (OSError, RuntimeError) as error:
            # torch's writer raises a plain RuntimeError where a file cannot be written.
            return WrittenPart(failure=write_reason(error))
        names = {path.name for path in self._folder.glob(f"__{self._rank}_*")}
        return _part(self._folder, names, None, results=results)

    def finish(self, parts: Sequence[WrittenPart]) -> dict[str, StoredFile]:
        self._planned.finish([part.results for part in parts])
        return {METADATA: _on_disk(self._folder / METADATA)}


def _part(folder: Path, names: set[str], failure: str | None, **written: Any) -> WrittenPart:
    if failure is None:
        try:
            return WrittenPart({name: _on_disk(folder / name) for name in sorted(names)}, **written)
        except OSError as error:
            failure = write_reason(error)
    return WrittenPart(failure=failure)


def _on_disk(path: Path) -> StoredFile:
    flush_to_disk(path)
    return StoredFile.of(path)


def load_states(engine: Engine, folder: Path, contents: CompleteCheckpoint, num_updates: int) -> None:
    """Load trained weights and their moments, as they were after `num_updates` updates; all ranks call it together."""
    if contents.layout == _PARTITIONS and isinstance(engine, DistributedCheckpointing):
        engine.load_partitions(folder, num_updates)
    else:
        engine.load_parameter_states(read_states(folder, contents), num_updates)


def read_states(
    folder: Path, contents: CompleteCheckpoint, *, with_moments: bool = True, with_averages: bool = True
) -> Iterator[ParameterState]:
    """The trained parameters of a checkpoint in either layout, in the order of `Engine.parameter_shapes`.

    Args:
        folder: the checkpoint.
        contents: of its `complete.json`.
        with_moments, with_averages: False does not read them.
    """
    if contents.layout == _PARTITIONS:
        yield from read_full(folder, contents.shapes, with_moments=with_moments, with_averages=with_averages)
        return
    file_of_tensor = contents.tensors
    files: dict[str, Any] = {name: safe_open(folder / name, framework="pt") for name in {*file_of_tensor.values()}}

    def read(tensor: str) -> Tensor:
        value: Tensor = files[file_of_tensor[tensor]].get_tensor(tensor)
        return value

    for name, moments in stored_moments(contents.shapes, file_of_tensor if with_moments else ()).items():
        assert name in file_of_tensor, f"complete.json lists the shape of {name}, but no file holds it"
        has_average = with_averages and average_name(name) in file_of_tensor
        average = read(average_name(name)) if has_average else None
        yield ParameterState(name, read(name), {moment: read(f"{name}//{moment}") for moment in moments}, average)


def write_complete(folder: Path, contents: CompleteCheckpoint) -> None:
    """Write `complete.json`, and flush it and the folder to disk."""
    contents.write(folder)
    flush_to_disk(folder / COMPLETE)
    flush_to_disk(folder)


class _StateWriter:
    """Writes a rank's parameters in files of limited size."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder
        self._rank = rank
        self._pending: dict[str, Tensor] = {}
        self._file_of_tensor: dict[str, str] = {}
        self._num_files = 0
        # Why nothing more is written.
        self.failure: str | None = None

    def write(self, states: Iterator[ParameterState]) -> dict[str, str]:
        """Names of the tensors that this rank wrote, each with the name of its file."""
        for state in states:
            self._pending.update(_tensors_of(state))
            if sum(tensor.nbytes for tensor in self._pending.values()) >= FILE_BYTES:
                self._write_pending()
        self._write_pending()
        return self._file_of_tensor

    def _write_pending(self) -> None:
        if not self._pending:
            return
        pending, self._pending = self._pending, {}
        file = f"state-{self._rank:05d}-{self._num_files:05d}.safetensors"
        if self.failure is not None:
            return
        try:
            save_tensors(pending, self._folder / file)
        except OSError as error:
            self.failure = write_reason(error)
            return
        self._file_of_tensor.update(dict.fromkeys(pending, file))
        self._num_files += 1


def _tensors_of(state: ParameterState) -> dict[str, Tensor]:
    moments = {f"{state.name}//{key}": moment.contiguous() for key, moment in state.moments.items()}
    average = {} if state.average is None else {average_name(state.name): state.average.contiguous()}
    return {state.name: state.weight.contiguous()} | moments | average


def flush_to_disk(path: Path) -> None:
    """Make a file, or the entries of a folder, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
