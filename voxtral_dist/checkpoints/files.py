"""The files of one checkpoint.

    checkpoints/step-0000100/
        state-RRRRR-PPPPP.safetensors   layout "whole": full float32 tensors, in files of limited size of each rank;
                                        a weight is called NAME, its moments NAME//exp_avg and NAME//exp_avg_sq, and
                                        its moving average, if the run has any, NAME//ema
        __R_0.distcp, .metadata         layout "dcp": the same tensors in partitions, from `DistributedCheckpointing`
        config.yaml                     the run's configuration
        complete.json                   progress, identity of data and model, sizes of the other files; written last

Both layouts can be read by any engine on any number of ranks. Frozen weights are not stored, and neither is random
state: the order of the data, augmentation and dropout are functions of (seed, step, slot).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from voxtral_dist.distributed.collectives import gather_on_first
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.ema import average_name
from voxtral_dist.engine.engine import DistributedCheckpointing, Engine, ParameterState
from voxtral_dist.engine.fsdp2.dcp_files import read_full, stored_moments

COMPLETE = "complete.json"
_WHOLE = "whole"
_PARTITIONS = "dcp"

# Tensors that a rank collects on the CPU before it writes them to a file.
FILE_BYTES = 2 * 2**30


def write_states(engine: Engine, folder: Path, world: World) -> dict[str, Any]:
    """Write trained weights and their moments; all ranks call it together.

    Returns:
        On rank 0, the entries of `complete.json` that `read_states` needs.
    """
    if isinstance(engine, DistributedCheckpointing):
        engine.save_partitions(folder)
        return {"layout": _PARTITIONS}
    file_of_tensor = gather_on_first(_StateWriter(folder, world.rank).write(engine.parameter_states()), world)
    return {"layout": _WHOLE, "tensors": {name: file for of_rank in file_of_tensor for name, file in of_rank.items()}}


def load_states(engine: Engine, folder: Path, contents: dict[str, Any], num_updates: int) -> None:
    """Load trained weights and their moments, as they were after `num_updates` updates; all ranks call it together."""
    if contents["layout"] == _PARTITIONS and isinstance(engine, DistributedCheckpointing):
        engine.load_partitions(folder, num_updates)
    else:
        engine.load_parameter_states(read_states(folder, contents), num_updates)


def read_states(
    folder: Path, contents: dict[str, Any], *, with_moments: bool = True, with_averages: bool = True
) -> Iterator[ParameterState]:
    """The trained parameters of a checkpoint in either layout, in the order of `Engine.parameter_shapes`.

    Args:
        folder: the checkpoint.
        contents: its `complete.json`.
        with_moments, with_averages: False does not read them.
    """
    if contents["layout"] == _PARTITIONS:
        yield from read_full(folder, contents["shapes"], with_moments=with_moments, with_averages=with_averages)
        return
    files: dict[str, Any] = {name: safe_open(folder / name, framework="pt") for name in contents["files"]}
    file_of_tensor: dict[str, str] = contents["tensors"]

    def read(tensor: str) -> Tensor:
        value: Tensor = files[file_of_tensor[tensor]].get_tensor(tensor)
        return value

    for name, moments in stored_moments(contents["shapes"], file_of_tensor if with_moments else ()).items():
        assert name in file_of_tensor, f"complete.json lists the shape of {name}, but no file holds it"
        has_average = with_averages and average_name(name) in file_of_tensor
        average = read(average_name(name)) if has_average else None
        yield ParameterState(name, read(name), {moment: read(f"{name}//{moment}") for moment in moments}, average)


def read_complete(folder: Path) -> dict[str, Any]:
    """The contents of `complete.json`."""
    contents: dict[str, Any] = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
    return contents


def write_complete(folder: Path, contents: dict[str, Any]) -> None:
    """Write `complete.json`, and flush all files of the folder to disk."""
    (folder / COMPLETE).write_text(json.dumps(contents, indent=1), encoding="utf-8")
    for path in [*folder.iterdir(), folder]:
        _flush_to_disk(path)


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file by name."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


def damage_of(folder: Path) -> str | None:
    """A message about the first missing or truncated file of a complete checkpoint; None if it is intact."""
    try:
        files = read_complete(folder)["files"]
    except (ValueError, KeyError):
        return f"The checkpoint {folder} is damaged: its {COMPLETE} cannot be read."
    for name, num_bytes in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else 0
        if found != num_bytes:
            return f"The checkpoint {folder} is damaged: {name} has {found} bytes instead of {num_bytes}."
    return None


class _StateWriter:
    """Writes a rank's parameters in files of limited size."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder
        self._rank = rank
        self._pending: dict[str, Tensor] = {}
        self._file_of_tensor: dict[str, str] = {}
        self._num_files = 0

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
        file = f"state-{self._rank:05d}-{self._num_files:05d}.safetensors"
        save_file(self._pending, self._folder / file)
        self._file_of_tensor.update(dict.fromkeys(self._pending, file))
        self._num_files += 1
        self._pending = {}


def _tensors_of(state: ParameterState) -> dict[str, Tensor]:
    moments = {f"{state.name}//{key}": moment.contiguous() for key, moment in state.moments.items()}
    average = {} if state.average is None else {average_name(state.name): state.average.contiguous()}
    return {state.name: state.weight.contiguous()} | moments | average


def _flush_to_disk(path: Path) -> None:
    """Make a file, or the entries of a folder, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
