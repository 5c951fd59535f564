"""All checkpoints of a run: saving, loading and rotation.

A checkpoint is written under a temporary name and renamed, so a folder without `complete.json` is no checkpoint.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from voxtral_dist.checkpoints.files import (
    COMPLETE,
    damage_of,
    file_sizes,
    load_states,
    read_complete,
    write_complete,
    write_states,
)
from voxtral_dist.checkpoints.identity import (
    data_identity,
    model_identity,
    refuse_other_data,
    refuse_other_shapes,
    refuse_other_training,
)
from voxtral_dist.checkpoints.progress import TrainProgress
from voxtral_dist.config import RunConfig, dump_config
from voxtral_dist.distributed.collectives import from_first_rank, wait_for_all
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.engine import Engine
from voxtral_dist.errors import UserError

_FORMAT = 1
_FOLDER = "checkpoints"
log = logging.getLogger(__name__)


def latest_step(run_dir: Path, world: World) -> int | None:
    """Step of a run's newest complete and intact checkpoint, as rank 0 sees the disk; None if it has no checkpoints.

    All ranks call it together. It needs no engine, so a run knows where it resumes before it loads a model.

    Raises:
        UserError: the run has checkpoints, but all of them are damaged.
    """
    intact, damages = _intact_and_damages(run_dir / _FOLDER, world)
    for damage in damages:
        log.warning("%s", damage)
    if damages and not intact:
        raise UserError(f"{damages[-1]} No other checkpoint is left: remove `checkpoints` to start over.")
    return intact[-1] if intact else None


def checkpoint_of_run(run_dir: Path, step: int | None) -> Path | None:
    """A checkpoint of a run, as this process sees the disk; None if the folder is not that of a run.

    Args:
        run_dir: the folder.
        step: of the checkpoint; None: the newest intact one.

    Raises:
        UserError: the run has no such checkpoint.
    """
    if not (run_dir / "config.yaml").is_file():
        return None
    found = _complete(run_dir / _FOLDER)
    if step is not None:
        found = [path for path in found if path.name == _name(step)]
    intact = [path for path in found if damage_of(path) is None]
    if not intact:
        which = "intact checkpoint" if step is None else f"intact checkpoint of step {step}, which it selected"
        raise UserError(f"The run {run_dir} has no {which}: rerun its training command to resume it.")
    return intact[-1]


class CheckpointDirectory:
    """The checkpoints of one run. All ranks call its methods together; `run_dir` must be shared by all nodes."""

    def __init__(self, config: RunConfig, data_fingerprint: str, world: World) -> None:
        self._folder = config.run_dir / _FOLDER
        self._keep = config.checkpoint.keep
        self._config = config
        self._world = world
        self._data_identity = data_identity(config, data_fingerprint)
        self._model_identity = from_first_rank(model_identity(config) if world.is_first else {}, world)
        # Step of the checkpoint that rotation never removes.
        self.kept_step: int | None = None

    def intact_steps(self) -> list[int]:
        """Steps of all complete and intact checkpoints, as rank 0 sees the disk."""
        return _intact_and_damages(self._folder, self._world)[0]

    def load(self, engine: Engine, step: int | None) -> TrainProgress:
        """Load the complete checkpoint of a step into the engine; without a step do nothing.

        Raises:
            UserError: it belongs to another model, other data or other batches.
        """
        return TrainProgress() if step is None else self._load_from(self._folder / _name(step), engine)

    def save(self, engine: Engine, progress: TrainProgress) -> Path:
        """Write the state of engine and run; older checkpoints are removed once this one is complete."""
        final = self._folder / _name(progress.step)
        temporary = self._folder / f".{final.name}.tmp"
        if self._world.is_first:
            self._remove_incomplete()
            temporary.mkdir(parents=True)
        wait_for_all(self._world)
        layout = write_states(engine, temporary, self._world)
        if self._world.is_first:
            self._write_contents(temporary, progress, engine, layout)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            self._remove_old()
        wait_for_all(self._world)
        return final

    def _load_from(self, folder: Path, engine: Engine) -> TrainProgress:
        contents = read_complete(folder)
        if contents.get("format") != _FORMAT:
            raise UserError(
                f"The checkpoint {folder} has format {contents.get('format')!r}, but this version reads {_FORMAT}."
            )
        refuse_other_training(folder, contents["model"], self._model_identity)
        refuse_other_shapes(folder, contents["shapes"], engine.parameter_shapes())
        refuse_other_data(folder, contents["data"], self._data_identity)
        progress = TrainProgress(**contents["progress"])
        load_states(engine, folder, contents, progress.step)
        engine.load_scalars(contents["scalars"])
        return progress

    def _write_contents(self, folder: Path, progress: TrainProgress, engine: Engine, layout: dict[str, Any]) -> None:
        files = file_sizes(folder)
        assert files.keys() >= set(layout.get("tensors", {}).values()), "rank 0 sees every file that a rank wrote"
        (folder / "config.yaml").write_text(dump_config(self._config), encoding="utf-8")
        contents = {
            "format": _FORMAT,
            "progress": asdict(progress),
            "data": self._data_identity,
            "model": self._model_identity,
            "shapes": engine.parameter_shapes(),
            "scalars": engine.scalars(),
            "files": files,
            **layout,
        }
        write_complete(folder, contents)

    def _remove_old(self) -> None:
        for folder in _complete(self._folder)[: -self._keep]:
            if self.kept_step is not None and folder.name == _name(self.kept_step):
                continue
            # `complete.json` goes first: if the process is killed here, what remains is no checkpoint.
            (folder / COMPLETE).unlink()
            shutil.rmtree(folder, ignore_errors=True)

    def _remove_incomplete(self) -> None:
        """Remove leftovers of a run that was killed while it saved or removed a checkpoint."""
        for folder in [*self._folder.glob(".step-*.tmp"), *self._folder.glob("step-*")]:
            if not (folder.name.startswith("step-") and (folder / COMPLETE).is_file()):
                shutil.rmtree(folder, ignore_errors=True)


def _intact_and_damages(folder: Path, world: World) -> tuple[list[int], list[str]]:
    """Steps of the complete and intact checkpoints in a folder, and the damages of the others; oldest first."""
    damages = {path: damage_of(path) for path in _complete(folder)} if world.is_first else {}
    steps = [int(path.name.removeprefix("step-")) for path, damage in damages.items() if damage is None]
    return from_first_rank((steps, [damage for damage in damages.values() if damage is not None]), world)


def _complete(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{COMPLETE}"))


def _name(step: int) -> str:
    return f"step-{step:07d}"
