"""Sharded tensors written by torch.distributed.checkpoint (DCP) in three parts: planned by all ranks together, written
by each rank alone, in any thread, and completed by rank 0.

DCP's own `save` does all three with collectives in between, and its `async_save` needs a process group of its own for
its thread, by whose addresses the nodes reach each other on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult
from torch.serialization import get_crc32_options, set_crc32_options

from voxtral_dist.distributed.collectives import gather_on_first, scatter_from_first
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.host_buffers import HostBuffers

# From a GPU, while earlier tensors are written; torch's default.
_COPY_AHEAD_BYTES = 10_000_000


class PlannedPartitions:
    """This rank's part of sharded tensors."""

    def __init__(self, tensors: Mapping[str, Tensor], folder: Path, world: World, buffers: HostBuffers | None) -> None:
        """Decide with all ranks who writes what.

        Args:
            tensors: sharded or equal on all ranks, by name.
            folder: an existing folder that all ranks share.
            world: all ranks.
            buffers: copy this rank's part to them, so that the tensors may change before they are written.
        """
        # Copying ahead would use a stream, and so a GPU's context, in the thread that writes.
        self._writer = FileSystemWriter(folder, per_thread_copy_ahead=_COPY_AHEAD_BYTES if buffers is None else 0)
        self._writer.fs = _ExistingFolders()
        self._planner = _HoldingPlanner()
        self._planner.set_up_planner(dict(tensors), self._writer.storage_meta(), world.is_first)
        self._writer.set_up_storage_writer(world.is_first)
        plans: Sequence[Any] = gather_on_first(
            self._writer.prepare_local_plan(self._planner.create_local_plan()), world
        )
        self._metadata: Metadata | None = None
        if world.is_first:
            plans, self._metadata = self._planner.create_global_plan(list(plans))
            plans = self._writer.prepare_global_plan(plans)
        self._plan = self._planner.finish_plan(scatter_from_first(plans, world))
        if buffers is not None:
            self._planner.hold([item.index for item in self._plan.items], buffers)

    def write(self) -> list[WriteResult]:
        """Write this rank's file; alone, in any thread.

        Raises:
            OSError, RuntimeError: it cannot be written.
        """
        with _without_crc32():
            writing = self._writer.write_data(self._plan, self._planner)
            writing.wait()
        return list(writing.value())

    def finish(self, results: Sequence[list[WriteResult]]) -> None:
        """Write `.metadata`, on rank 0.

        Args:
            results: what `write` returned on each rank.
        """
        assert self._metadata is not None, "rank 0 plans"
        self._writer.finish(self._metadata, list(results))


class _ExistingFolders(FileSystem):
    """A file system in which DCP makes no folder: rank 0 has made it, and a `run_dir` that is gone stays gone."""

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Do nothing."""


@contextmanager
def _without_crc32() -> Iterator[None]:
    """Write tensors without the checksums of zip files, which cost more time than writing.

    Checkpoints have checksums of whole files, and torch verifies none of a zip file.
    """
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


class _HoldingPlanner(DefaultSavePlanner):
    """DCP's planner, which can hold copies of what it will write."""

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[MetadataIndex, Tensor] = {}

    def hold(self, indices: Iterable[MetadataIndex], buffers: HostBuffers) -> None:
        """Copy tensors of this rank to host memory."""
        self._held = {
            index: buffers.copy(index, super(_HoldingPlanner, self).lookup_object(index)) for index in indices
        }
        buffers.wait()

    def lookup_object(self, index: MetadataIndex) -> Any:
        """See `DefaultSavePlanner`."""
        return self._held[index] if index in self._held else super().lookup_object(index)
