"""Whether a checkpoint is what was written: by sizes, or by the contents of all its files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError, safe_open

from voxtral_dist.checkpoints.complete import COMPLETE, METADATA, CompleteCheckpoint, DamageError, read_complete
from voxtral_dist.distributed.collectives import PatientSum, first_over_ranks
from voxtral_dist.distributed.world import World
from voxtral_dist.errors import first_line

_NUM_THREADS = 4
# Checkpoints that this process has read already: its folder, and when it was completed.
_verified: set[tuple[Path, int]] = set()


def damage_of(folder: Path) -> str | None:
    """A message about the first missing or truncated file of a complete checkpoint; None if its sizes are right.

    Raises:
        UserError: a newer version wrote it.
    """
    try:
        _of_right_sizes(folder)
    except DamageError as damage:
        return str(damage)
    return None


def damage_over_ranks(folder: Path, world: World) -> str | None:
    """A message about the first damage of a complete checkpoint, whose files are all read; None if it is intact.

    All ranks call it together and get the same. Each reads its part of the files, so that the time is that of reading
    the checkpoint once.

    Raises:
        UserError: a newer version wrote it.
    """
    damage, arrive = None, PatientSum(world)
    try:
        complete = _of_right_sizes(folder)
        if folder.name.startswith("step-") and folder.name != f"step-{complete.progress.step:07d}":
            raise DamageError(folder, f"its {COMPLETE} is that of step {complete.progress.step}")
        by_size = sorted(complete.files, key=lambda name: (-complete.files[name].num_bytes, name))
        _refuse_other_contents(folder, complete, by_size[world.rank :: world.size])
    except DamageError as error:
        damage = str(error)
    arrive(0)
    damage = first_over_ranks(damage, world)
    if damage is None:
        _verified.add(_identity(folder))
    return damage


def verified(folder: Path) -> CompleteCheckpoint:
    """The contents of a complete checkpoint whose files this process, or all ranks together, have found intact.

    Raises:
        DamageError: it is not intact.
        UserError: a newer version wrote it.
    """
    complete = _of_right_sizes(folder)
    if _identity(folder) not in _verified:
        _refuse_other_contents(folder, complete, sorted(complete.files))
        _verified.add(_identity(folder))
    return complete


def _identity(folder: Path) -> tuple[Path, int]:
    return folder.resolve(), (folder / COMPLETE).stat().st_mtime_ns


def _of_right_sizes(folder: Path) -> CompleteCheckpoint:
    complete = read_complete(folder)
    for name, file in complete.files.items():
        try:
            damage = file.damage(folder / name)
        except OSError as error:
            damage = f"{name} cannot be read ({error.strerror})"
        if damage is not None:
            raise DamageError(folder, damage)
    return complete


def _refuse_other_contents(folder: Path, complete: CompleteCheckpoint, names: Sequence[str]) -> None:
    def damage(name: str) -> str | None:
        try:
            inside = complete.files[name].damage_inside(folder / name)
            return inside or _damage_of_structure(folder, complete, name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or first_line(error)})"

    with ThreadPoolExecutor(min(_NUM_THREADS, os.cpu_count() or 1)) as threads:
        for found in threads.map(damage, names):
            if found is not None:
                raise DamageError(folder, found)


def _damage_of_structure(folder: Path, complete: CompleteCheckpoint, name: str) -> str | None:
    """What a loader would stumble on in a file: checkpoints of format 1 have no checksums."""
    if complete.layout == "dcp":
        if name != METADATA:
            return None
        from voxtral_dist.engine.fsdp2.dcp_metadata import damage_of_metadata

        sizes = {file: stored.num_bytes for file, stored in complete.files.items()}
        return damage_of_metadata(folder, sizes, complete.shapes)
    tensors = [tensor for tensor, file in complete.tensors.items() if file == name]
    try:
        return _damage_of_tensors(folder / name, tensors, complete) if tensors else None
    except SafetensorError as error:
        return f"the header of {name} cannot be read ({first_line(error)})"


def _damage_of_tensors(path: Path, tensors: Sequence[str], complete: CompleteCheckpoint) -> str | None:
    with safe_open(path, framework="pt") as file:
        missing = set(tensors) - set(file.keys())
        if missing:
            return f"{path.name} does not hold {min(missing)}"
        for tensor in tensors:
            shape = complete.shapes.get(tensor.partition("//")[0])
            if shape is None or tuple(file.get_slice(tensor).get_shape()) != tuple(shape):
                return f"{tensor} in {path.name} has another shape than in {COMPLETE}"
    return None
