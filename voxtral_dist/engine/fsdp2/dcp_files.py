"""Tensors in shards on disk, by torch.distributed.checkpoint (DCP): each rank writes what it holds, none is gathered.

They are read as other shards on any number of ranks, or as whole tensors, without a process group. DCP is imported
where it is used, because that takes a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from voxtral_dist.engine.engine import ParameterState


def write_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write this rank's part of sharded tensors; all ranks call it together, on a folder that they share.

    Raises:
        CheckpointException: on all ranks, if one could not write.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    save(tensors, storage_writer=FileSystemWriter(folder))


def read_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Fill this rank's part of sharded tensors in place, and read nothing else; all ranks call it together."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    load(tensors, storage_reader=FileSystemReader(folder))


def stored_moments(parameters: Iterable[str], stored: Iterable[str]) -> dict[str, list[str]]:
    """The names of each parameter's moments, of those of all stored tensors: `NAME` and `NAME//MOMENT`."""
    moments: dict[str, list[str]] = {name: [] for name in parameters}
    for key in stored:
        name, _, moment = key.partition("//")
        if moment:
            moments[name].append(moment)
    return moments


def read_whole(
    folder: Path, shapes: Mapping[str, Sequence[int]], *, with_moments: bool = True
) -> Iterator[ParameterState]:
    """What `write_shards` wrote, parameter by parameter, as float32 tensors of these full shapes."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    stored = FileSystemReader(folder).read_metadata().state_dict_metadata if with_moments else ()
    moments = stored_moments(shapes, stored)
    for name, shape in shapes.items():
        whole = {key: torch.empty(tuple(shape)) for key in (name, *(f"{name}//{moment}" for moment in moments[name]))}
        load(whole, storage_reader=FileSystemReader(folder), no_dist=True)
        yield ParameterState(name, whole[name], {moment: whole[f"{name}//{moment}"] for moment in moments[name]})
