"""Checkpoints of a few small tensors, written as engines write them, without a model."""

from __future__ import annotations

import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from voxtral_dist.checkpoints.directory import CheckpointDirectory
from voxtral_dist.checkpoints.progress import TrainProgress
from voxtral_dist.config import RunConfig
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.engine import CopyTensor, ParameterState, on_cpu

SHAPES = {"a": (64, 8), "b": (200, 200), "c": (16, 16)}


class WholeStates:
    """An engine whose ranks write every W-th parameter, filled with a value; keeps what it loads."""

    def __init__(self, world: World, value: float = 0.0) -> None:
        self._world = world
        self.value = value
        self.loaded: dict[str, float] = {}

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        return SHAPES

    def parameter_states(self, copy: CopyTensor = on_cpu) -> Iterator[ParameterState]:
        for number, (name, shape) in enumerate(SHAPES.items()):
            if number % self._world.size == self._world.rank:
                moments = {"exp_avg": copy((name, "exp_avg"), torch.zeros(shape))}
                yield ParameterState(name, copy((name, "weight"), torch.full(shape, self.value)), moments)

    def load_parameter_states(self, states: Iterator[ParameterState], num_updates: int) -> None:
        self.loaded = {state.name: float(state.weight.mean()) for state in states}

    def not_finite(self) -> list[str]:
        return [] if math.isfinite(self.value) else ["a"]

    def scalars(self) -> dict[str, float]:
        return {}

    def load_scalars(self, scalars: dict[str, float]) -> None:
        pass


class PartitionedStates(WholeStates):
    """The same with the layout `dcp`."""

    def partitions(self) -> dict[str, Tensor]:
        own = {f"{name}//rank{self._world.rank}": torch.full(shape, self.value) for name, shape in SHAPES.items()}
        return own | {name: torch.full(shape, self.value) for name, shape in SHAPES.items()}

    def load_partitions(self, folder: Path, num_updates: int) -> None:
        from voxtral_dist.engine.fsdp2.dcp_files import read_partitions

        tensors = {name: torch.empty(shape) for name, shape in SHAPES.items()}
        read_partitions(tensors, folder)
        self.loaded = {name: float(tensor.mean()) for name, tensor in tensors.items()}


LAYOUTS: dict[str, Any] = {"whole": WholeStates, "dcp": PartitionedStates}


def save_steps(world: World, config: RunConfig, layout: str, steps: tuple[int, ...]) -> CheckpointDirectory:
    """Save a checkpoint at each step, filled with its number."""
    directory = CheckpointDirectory(config, "", world)
    for step in steps:
        directory.save(LAYOUTS[layout](world, float(step)), TrainProgress(step=step))
    return directory


@contextmanager
def files_limited_to(num_bytes: int) -> Iterator[None]:
    """Files of this process that grow larger cannot be written, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
