"""All checkpoints of a run: saving, loading and rotation.

A checkpoint is written under a temporary name and renamed, so a folder without `complete.json` is no checkpoint. A
damaged one is set aside under another name, and counts no more.
"""

from __future__ import annotations

import errno
import itertools
import logging
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from voxtral_dist.checkpoints.complete import COMPLETE, CompleteCheckpoint, StoredFile, read_complete
from voxtral_dist.checkpoints.files import WrittenPart, flush_to_disk, hold_states, load_states, write_complete
from voxtral_dist.checkpoints.identity import (
    data_identity,
    model_identity,
    refuse_other_data,
    refuse_other_shapes,
    refuse_other_training,
)
from voxtral_dist.checkpoints.progress import TrainProgress
from voxtral_dist.checkpoints.save_under_way import SaveUnderWay
from voxtral_dist.checkpoints.verifying import damage_of, damage_over_ranks, verified
from voxtral_dist.config import RunConfig, dump_config
from voxtral_dist.distributed.collectives import (
    PatientSum,
    computed_on_first,
    first_over_ranks,
    from_first_rank,
    gather_on_first,
)
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.engine import Engine
from voxtral_dist.engine.host_buffers import HostBuffers
from voxtral_dist.errors import SharedWriteError, UserError, write_reason

_FOLDER = "checkpoints"
log = logging.getLogger(__name__)


def latest_step(run_dir: Path, world: World) -> int | None:
    """Step of a run's newest intact checkpoint; None if it has no checkpoints.

    All ranks call it together: they read all files of the newest one, and of the one before it where that is damaged,
    and so on. Damaged ones are renamed. It needs no engine, so a run knows where it resumes before it loads a model.

    Raises:
        UserError: the run has checkpoints, but all of them are damaged, and keep their names.
        SharedWriteError: a damaged one cannot be renamed.
    """
    names = from_first_rank([path.name for path in _complete(run_dir / _FOLDER)] if world.is_first else [], world)
    damages: dict[Path, str] = {}
    for folder in (run_dir / _FOLDER / name for name in reversed(names)):
        damage = damage_over_ranks(folder, world)
        if damage is None:
            set_aside(damages, world)
            return _step(folder)
        damages[folder] = damage
    for damage in damages.values():
        raise UserError(f"{damage} No other checkpoint is left: remove `checkpoints` to start over.")
    return None


def newest_intact_step(run_dir: Path) -> int | None:
    """Step of the newest checkpoint whose files have the right sizes, as this process sees the disk.

    Raises:
        UserError: a newer version wrote one.
    """
    intact = [path for path in _complete(run_dir / _FOLDER) if damage_of(path) is None]
    return _step(intact[-1]) if intact else None


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return run_dir / _FOLDER / _name(step)


def set_aside(damages: dict[Path, str], world: World) -> None:
    """Rename damaged checkpoints, and say so. All ranks call it together."""
    failure = None
    for folder, damage in damages.items() if world.is_first else ():
        try:
            renamed = _rename_damaged(folder)
        except OSError as error:
            failure = f"{damage} It cannot be renamed: {write_reason(error)}."
        else:
            log.warning("%s It is now called %s, and is not used.", damage, renamed.name)
    _raise_if(first_over_ranks(failure, world))


def checkpoint_of_run(run_dir: Path, step: int | None) -> Path | None:
    """A checkpoint of a run, whose files this process has read; None if the folder is not that of a run.

    Args:
        run_dir: the folder.
        step: of the checkpoint; None: the newest intact one.

    Raises:
        UserError: the run has no such checkpoint.
    """
    if not (run_dir / "config.yaml").is_file():
        return None
    found = [path for path in _complete(run_dir / _FOLDER) if step is None or path.name == _name(step)]
    for folder in reversed(found):
        try:
            verified(folder)
        except UserError as error:
            log.warning("%s", error)
        else:
            return folder
    which = "intact checkpoint" if step is None else f"intact checkpoint of step {step}, which it selected"
    raise UserError(f"The run {run_dir} has no {which}: rerun its training command to resume it.")


class CheckpointDirectory:
    """The checkpoints of one run. All ranks call its methods together; `run_dir` must be shared by all nodes."""

    def __init__(
        self, config: RunConfig, data_fingerprint: str, world: World, test_sets: Mapping[str, str] | None = None
    ) -> None:
        """The directory of a run.

        Args:
            config: of the run.
            data_fingerprint: of its training data.
            world: all ranks.
            test_sets: fingerprint of each test set.
        """
        self._folder = config.run_dir / _FOLDER
        self._keep = config.checkpoint.keep
        self._config = config
        self._world = world
        self._test_sets = dict(test_sets or {})
        self._data_identity = data_identity(config, data_fingerprint)
        self._model_identity = from_first_rank(model_identity(config) if world.is_first else {}, world)
        self._save: SaveUnderWay | None = None
        self._buffers = HostBuffers()
        # Step of the checkpoint that rotation never removes.
        self.kept_step: int | None = None
        # Steps of checkpoints that somebody still reads.
        self.steps_in_use: Callable[[], Collection[int]] = tuple

    def intact_steps(self) -> list[int]:
        """Steps of all checkpoints whose files have the right sizes, as rank 0 sees the disk."""
        return from_first_rank([_step(path) for path in self._intact()] if self._world.is_first else [], self._world)

    def newest(self) -> str | None:
        """The name of the newest checkpoint; None if there is none. All ranks call it together."""
        steps = self.intact_steps()
        return _name(steps[-1]) if steps else None

    def is_intact(self, step: int) -> bool:
        """Whether the checkpoint of a step is what was written, by the contents of all its files.

        All ranks call it together. A damaged one is renamed.
        """
        folder = self._folder / _name(step)
        damage = damage_over_ranks(folder, self._world)
        if damage is not None:
            set_aside({folder: damage}, self._world)
        return damage is None

    def load(self, engine: Engine, step: int | None) -> TrainProgress:
        """Load the complete checkpoint of a step into the engine; without a step do nothing.

        Raises:
            UserError: it belongs to another model, other data or other batches.
        """
        return TrainProgress() if step is None else self._load_from(self._folder / _name(step), engine)

    def save(self, engine: Engine, progress: TrainProgress) -> Path:
        """Write the state of engine and run; older checkpoints are removed once this one is complete.

        Raises:
            SharedWriteError: a rank cannot write, so that nothing has changed on disk. All ranks raise it.
            UserError: a weight is not finite: what is saved is always worth loading.
        """
        self.start(engine, progress, in_background=False)
        return self.finish()

    def start(self, engine: Engine, progress: TrainProgress, *, in_background: bool) -> None:
        """Begin a checkpoint, which `finish` completes; until then there is none.

        Args:
            engine: its state is written.
            progress: of the run.
            in_background: copy the state to host memory, and let a thread write it while training goes on. A rank's
                part `is_written` when it has ended.

        Raises:
            SharedWriteError, UserError: see `save`.
        """
        assert self._save is None, "at most one checkpoint is under way"
        self._refuse_not_finite(engine, progress.step)
        final = self._folder / _name(progress.step)
        temporary = final.with_name(f".{final.name}.tmp")
        self._on_first(final, lambda: self._begin(temporary))
        held = hold_states(engine, temporary, self._world, self._buffers if in_background else None)
        self._save = SaveUnderWay(final, temporary, held, progress, engine.parameter_shapes(), engine.scalars())
        if in_background:
            save = self._save
            save.write_in_background(self._world, lambda parts: self._completed(save, parts))

    @property
    def is_under_way(self) -> bool:
        """Whether a checkpoint was begun and not completed."""
        return self._save is not None

    @property
    def is_written(self) -> bool:
        """Whether this rank has written its part of the checkpoint under way, and rank 0 has completed it."""
        return self._save is not None and self._save.is_written

    @property
    def buffer_bytes(self) -> int:
        """Host memory in bytes that this rank keeps for copies of the state."""
        return self._buffers.num_bytes

    def finish(self) -> Path:
        """Complete the checkpoint under way, after all ranks have written their parts.

        Raises:
            SharedWriteError: see `save`.
        """
        assert self._save is not None, "a checkpoint was begun"
        save, self._save = self._save, None
        # Disks of different nodes take different times.
        arrive = PatientSum(self._world)
        if save.is_in_background:
            failure = save.wait()
            arrive(0)
            self._refuse_if(from_first_rank(failure, self._world), save.final)
        else:
            part = save.held.write()
            arrive(0)
            parts = gather_on_first(part, self._world)
            self._refuse_if(computed_on_first(lambda: self._completed(save, parts), self._world), save.final)
        return save.final

    def outlasted(self, limit_seconds: float) -> str | None:
        """The name of the checkpoint under way, if it is complete within a time; None if not, or if there is none.

        One rank alone may call it, because threads complete the checkpoint, whatever the other ranks wait for.
        """
        save = self._save
        return save.final.name if save is not None and save.is_complete_within(limit_seconds) else None

    def _refuse_not_finite(self, engine: Engine, step: int) -> None:
        found = first_over_ranks(next(iter(engine.not_finite()), None), self._world)
        if found is not None:
            newest = self.newest()
            raise UserError(
                f"`{found}` is not finite after step {step}, so this state is not saved, and the run ends: lower "
                "`optimizer.learning_rate`, or lengthen `optimizer.warmup_steps`. "
                + (f"The last finite checkpoint is {newest}." if newest else "There is no checkpoint.")
            )

    def _on_first(self, final: Path, write: Callable[[], None]) -> None:
        """Let rank 0 write, while the others wait; all of them raise if it cannot."""

        def reason() -> str | None:
            try:
                write()
            except OSError as error:
                return write_reason(error)
            return None

        self._refuse_if(computed_on_first(reason, self._world), final)

    def _refuse_if(self, failure: str | None, final: Path) -> None:
        """Remove what was written, and raise on all ranks, if there was a failure on any."""
        if failure is None:
            return
        if self._world.is_first:
            shutil.rmtree(final.with_name(f".{final.name}.tmp"), ignore_errors=True)
        raise SharedWriteError(
            f"The checkpoint {final} cannot be written: {failure}. What was saved before is as it was: fix that, and "
            "rerun the same command to resume."
        )

    def _begin(self, temporary: Path) -> None:
        self._remove_incomplete()
        # Not its parents: a `run_dir` that is gone must not come back empty.
        self._folder.mkdir(exist_ok=True)
        temporary.mkdir()
        needed, free = self._num_bytes_of_last(), shutil.disk_usage(temporary).free
        if free < needed:
            temporary.rmdir()
            raise OSError(errno.ENOSPC, f"it needs {needed / 1e9:.3g} GB, but {free / 1e9:.3g} GB are free")

    def _num_bytes_of_last(self) -> int:
        """Size of the newest checkpoint, as large as the next one will be; 0 if there is none."""
        intact = self._intact()
        return read_complete(intact[-1]).num_bytes if intact else 0

    def _completed(self, save: SaveUnderWay, parts: Sequence[WrittenPart]) -> str | None:
        """Complete a checkpoint on rank 0; why that is impossible, None if it is complete."""
        for rank, part in enumerate(parts):
            if part.failure is not None:
                return f"{part.failure} (rank {rank})"
        try:
            self._finish(save, parts)
        except OSError as error:
            return write_reason(error)
        return None

    def _finish(self, save: SaveUnderWay, parts: Sequence[WrittenPart]) -> None:
        config = save.temporary / "config.yaml"
        config.write_text(dump_config(self._config), encoding="utf-8")
        flush_to_disk(config)
        files = {name: file for part in parts for name, file in part.files.items()} | {
            config.name: StoredFile.of(config)
        }
        self._refuse_unseen(save.temporary, files, parts)
        contents = CompleteCheckpoint(
            progress=save.progress,
            data=self._data_identity,
            model=self._model_identity,
            shapes=save.shapes,
            scalars=save.scalars,
            files=files | save.held.finish(parts),
            layout=save.held.layout,
            tensors={name: file for part in parts for name, file in part.tensors.items()},
            test_sets=self._test_sets,
        )
        write_complete(save.temporary, contents)
        shutil.rmtree(save.final, ignore_errors=True)
        save.temporary.rename(save.final)
        self._remove_old(save.final)

    def _refuse_unseen(self, folder: Path, files: Mapping[str, StoredFile], parts: Sequence[WrittenPart]) -> None:
        """Refuse a checkpoint of which rank 0 does not see every file that a rank wrote."""
        for rank, part in enumerate(parts):
            for name in part.files:
                damage = files[name].damage(folder / name)
                if damage is not None:
                    raise OSError(
                        errno.ENOENT,
                        f"rank 0 does not see what rank {rank} wrote ({damage}); `run_dir` must be shared by all nodes",
                    )

    def _load_from(self, folder: Path, engine: Engine) -> TrainProgress:
        contents = read_complete(folder)
        refuse_other_training(folder, contents.model, self._model_identity)
        refuse_other_shapes(folder, contents.shapes, engine.parameter_shapes())
        refuse_other_data(folder, contents.data, self._data_identity)
        load_states(engine, folder, contents, contents.progress.step)
        engine.load_scalars(contents.scalars)
        return contents.progress

    def _intact(self) -> list[Path]:
        """The checkpoints whose files have the right sizes, oldest first."""
        return [path for path in _complete(self._folder) if damage_of(path) is None]

    def _remove_old(self, newest: Path) -> None:
        """Remove all but the newest intact ones. Damaged ones are renamed, and never counted."""
        for folder in _complete(self._folder):
            damage = damage_of(folder)
            if damage is not None:
                log.warning("%s It is now called %s, and is not used.", damage, _rename_damaged(folder).name)
        others = [path for path in _complete(self._folder) if path != newest]
        for folder in others[: max(0, len(others) + 1 - self._keep)]:
            if _step(folder) == self.kept_step or _step(folder) in self.steps_in_use():
                continue
            # `complete.json` goes first: if the process is killed here, what remains is no checkpoint.
            (folder / COMPLETE).unlink()
            shutil.rmtree(folder, ignore_errors=True)

    def _remove_incomplete(self) -> None:
        """Remove leftovers of a run that was killed while it saved or removed a checkpoint."""
        for folder in [*self._folder.glob(".step-*.tmp"), *self._folder.glob("step-*")]:
            if not (folder.name.startswith("step-") and (folder / COMPLETE).is_file()):
                shutil.rmtree(folder, ignore_errors=True)


def _rename_damaged(folder: Path) -> Path:
    """Take its name from a damaged checkpoint."""
    name = f"damaged-{folder.name}"
    taken = {path.name for path in folder.parent.glob(f"{name}*")}
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    target = folder.with_name(name if name not in taken else next(one for one in numbered if one not in taken))
    return folder.rename(target)


def _raise_if(failure: str | None) -> None:
    if failure is not None:
        raise SharedWriteError(failure)


def _complete(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{COMPLETE}") if path.parent.name[5:].isdecimal())


def _name(step: int) -> str:
    return f"step-{step:07d}"


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
