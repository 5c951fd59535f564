"""Sharded tensors on disk by torch.distributed.checkpoint (DCP): each rank wrote its partitions (see `dcp_writing`).

They can be read in other partitions on any number of ranks, or as full tensors without a process group. DCP is imported
where it is used, because importing it takes a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from voxtral_dist.engine.ema import AVERAGE, average_name
from voxtral_dist.engine.engine import ParameterState
from voxtral_dist.engine.fsdp2.block_states import dequantize


def read_partitions(tensors: dict[str, Tensor], folder: Path) -> None:
    """Fill this rank's partitions of sharded tensors in place, reading only those; all ranks call it together."""
    from torch.distributed.checkpoint.state_dict_loader import load

    from voxtral_dist.engine.fsdp2.dcp_metadata import SafeReader

    load(tensors, storage_reader=SafeReader(folder))


def stored_names(folder: Path) -> list[str]:
    """Names of the tensors in a folder."""
    from voxtral_dist.engine.fsdp2.dcp_metadata import stored_tensors

    return list(stored_tensors(folder))


def stored_moments(parameters: Iterable[str], stored: Iterable[str]) -> dict[str, list[str]]:
    """Names of each parameter's moments among the names of stored tensors, `NAME` and `NAME//MOMENT`."""
    moments: dict[str, list[str]] = {name: [] for name in parameters}
    for key in stored:
        name, _, moment = key.partition("//")
        if moment and moment != AVERAGE:
            moments[name].append(moment)
    return moments


def read_full(
    folder: Path, shapes: Mapping[str, Sequence[int]], *, with_moments: bool = True, with_averages: bool = True
) -> Iterator[ParameterState]:
    """Read what `PlannedPartitions` wrote as full float32 tensors, parameter by parameter; moments are dequantized.

    Args:
        folder: the folder that was written.
        shapes: the full shape of each parameter.
        with_moments, with_averages: False does not read them.
    """
    from torch.distributed.checkpoint.state_dict_loader import load

    from voxtral_dist.engine.fsdp2.dcp_metadata import SafeReader, stored_tensors

    stored = stored_tensors(folder)
    moments = stored_moments(shapes, stored if with_moments else ())
    for name, shape in shapes.items():
        # Weights may be stored in bfloat16. Quantized moments are read as they are.
        full = {name: torch.empty(tuple(shape))}
        for key in (f"{name}//{moment}" for moment in moments[name]):
            full[key] = torch.empty(stored[key].size, dtype=stored[key].properties.dtype)
        if with_averages and average_name(name) in stored:
            full[average_name(name)] = torch.empty(tuple(shape))
        load(full, storage_reader=SafeReader(folder), no_dist=True)
        whole = dequantize({moment: full[f"{name}//{moment}"] for moment in moments[name]})
        yield ParameterState(name, full[name], whole, full.get(average_name(name)))
