"""Everything a run needs to go on, saved whole or not at all, for any number of ranks and any engine.

    checkpoints/step-0000100/
        state-RRRRR-PPPPP.safetensors   written by rank R: NAME, and NAME//exp_avg and the like; float32, full shape
        __R_0.distcp, .metadata         or the same tensors in shards, where the engine can write these (`ShardFiles`)
        config.yaml                     the run's configuration
        complete.json                   progress, what data and model it belongs to, which file holds what; written last

The folder is written under a temporary name and renamed; without `complete.json` it does not exist for `latest()`.
Tensors have their full shapes, whole or put together from shards, so a run goes on under any engine and on any number
of ranks. Frozen weights are not stored. There is no random state in it: the order of data, augmentation and dropout are
functions of (seed, step, slot).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from voxtral_dist.config import RunConfig, dump_config, load_config
from voxtral_dist.distributed.collectives import from_first_rank, gather_on_first, wait_for_all
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.engine import Engine, ParameterState, ShardFiles
from voxtral_dist.engine.fsdp2.dcp_files import read_whole, stored_moments
from voxtral_dist.errors import UserError
from voxtral_dist.model.voxtral import TrainedVoxtral
from voxtral_dist.model.weights import fingerprint, load_voxtral

_COMPLETE = "complete.json"
_FORMAT = 2
# How tensors lie on disk: each in one safetensors file, or in shards of several ranks (`engine.shard_files`).
_WHOLE = "whole"
_SHARDS = "dcp"
log = logging.getLogger(__name__)

# Keys of `train_data` that change neither what is drawn nor its order: shards may move, and are known by fingerprint.
_WHERE_AND_HOW_FAST = {"shards", "sets", "num_workers", "max_bad_fraction", "max_bad_in_a_row", "too_long"}

# A rank holds this much on the CPU before it writes a part.
_PART_BYTES = 2 * 2**30


@dataclass(frozen=True)
class TrainProgress:
    """How far a run has come. `step` updates were made; the next one has this index.

    num_too_long: of the bad samples, those that no limit of bad samples counts.
    """

    step: int = 0
    num_utterances_seen: int = 0
    num_bad_utterances: int = 0
    num_too_long: int = 0
    audio_seconds: float = 0.0
    train_seconds: float = 0.0


class CheckpointDirectory:
    """The checkpoints of one run. All ranks call its methods together; `run_dir` must be shared by all nodes."""

    def __init__(self, config: RunConfig, data_fingerprint: str, world: World) -> None:
        self._folder = config.run_dir / "checkpoints"
        self._keep = config.checkpoint.keep
        self._config = config
        self._identity = _data_identity(config, data_fingerprint)
        self._world = world
        # Of steps whose checkpoint is kept however old it is.
        self.kept_step: int | None = None
        self._model_identity = from_first_rank(_model_identity(config) if world.is_first else {}, world)

    def latest(self) -> Path | None:
        """The complete checkpoint with the most steps whose files are whole, as rank 0 sees the disk.

        Raises:
            UserError: there are checkpoints, but all are damaged: starting from nothing is not what was asked for.
        """
        damages = self._damages()
        whole = [folder for folder, damage in damages.items() if damage is None]
        reported = [damage for damage in damages.values() if damage is not None]
        newest, reported = from_first_rank((whole[-1] if whole else None, reported), self._world)
        for damage in reported:
            log.warning("%s", damage)
        if newest is None and reported:
            raise UserError(f"{reported[-1]} No other one is left: remove `checkpoints` to start from the beginning.")
        return newest

    def whole_steps(self) -> list[int]:
        """The steps of all complete checkpoints whose files are whole, as rank 0 sees the disk."""
        damages = self._damages()
        steps = [int(folder.name.removeprefix("step-")) for folder, damage in damages.items() if damage is None]
        return from_first_rank(steps, self._world)

    def _damages(self) -> dict[Path, str | None]:
        """What is wrong with each complete checkpoint, the oldest first; rank 0 alone looks."""
        return {folder: _damage(folder) for folder in self._complete_ones()} if self._world.is_first else {}

    def _complete_ones(self) -> list[Path]:
        return sorted(path.parent for path in self._folder.glob(f"step-*/{_COMPLETE}"))

    def resume(self, engine: Engine) -> TrainProgress | None:
        """Load the newest complete checkpoint into the engine; None where there is none.

        Raises:
            UserError: it belongs to another model, or to other data or other batches, or all of them are damaged.
        """
        folder = self.latest()
        return None if folder is None else self._load_from(folder, engine)

    def load(self, engine: Engine, step: int) -> TrainProgress:
        """Load the complete checkpoint of a step into the engine; see `resume`."""
        return self._load_from(self._folder / _name(step), engine)

    def _load_from(self, folder: Path, engine: Engine) -> TrainProgress:
        contents = _read_complete(folder)
        if contents.get("format") != _FORMAT:
            raise UserError(
                f"The checkpoint {folder} has format {contents.get('format')!r}, but this version reads {_FORMAT}."
            )
        self._check_model_identity(folder, contents["model"])
        _check_model(folder, contents["shapes"], engine.parameter_shapes())
        self._check_data(folder, contents["data"])
        progress = TrainProgress(**contents["progress"])
        self._load(engine, folder, contents, progress.step)
        engine.load_scalars(contents["scalars"])
        return progress

    def save(self, engine: Engine, progress: TrainProgress) -> Path:
        """Write the state of engine and progress; older checkpoints are removed when this one is complete."""
        final = self._folder / _name(progress.step)
        temporary = self._folder / f".{final.name}.tmp"
        if self._world.is_first:
            self._sweep()
            temporary.mkdir(parents=True)
        wait_for_all(self._world)
        layout = self._write(engine, temporary)
        if self._world.is_first:
            self._complete(temporary, progress, engine, layout)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            self._remove_old()
        wait_for_all(self._world)
        return final

    def _write(self, engine: Engine, folder: Path) -> dict[str, Any]:
        """Write weights and moments; on rank 0, what a reader must know of their files."""
        if isinstance(engine, ShardFiles):
            engine.save_shards(folder)
            return {"layout": _SHARDS}
        placed = gather_on_first(_PartWriter(folder, self._world).write(engine.parameter_states()), self._world)
        return {"layout": _WHOLE, "tensors": {name: file for part in placed for name, file in part.items()}}

    def _load(self, engine: Engine, folder: Path, contents: dict[str, Any], num_updates: int) -> None:
        if contents.get("layout", _WHOLE) == _SHARDS and isinstance(engine, ShardFiles):
            engine.load_shards(folder, num_updates)
        else:
            engine.load_parameter_states(_read_states(folder, contents), num_updates)

    def _complete(self, folder: Path, progress: TrainProgress, engine: Engine, layout: dict[str, Any]) -> None:
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        assert files.keys() >= set(layout.get("tensors", {}).values()), "every file that a rank wrote is there"
        (folder / "config.yaml").write_text(dump_config(self._config), encoding="utf-8")
        contents = {
            "format": _FORMAT,
            "progress": asdict(progress),
            "data": self._identity,
            "model": self._model_identity,
            "shapes": engine.parameter_shapes(),
            "scalars": engine.scalars(),
            "files": files,
            **layout,
        }
        (folder / _COMPLETE).write_text(json.dumps(contents, indent=1), encoding="utf-8")
        for path in [*folder.iterdir(), folder]:
            _to_disk(path)

    def _remove_old(self) -> None:
        for folder in self._complete_ones()[: -self._keep]:
            if self.kept_step is not None and folder.name == _name(self.kept_step):
                continue
            # First the file that makes it a checkpoint: being killed in between must not leave half a one.
            (folder / _COMPLETE).unlink()
            shutil.rmtree(folder, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what a run that was killed while saving or removing has left behind."""
        for folder in [*self._folder.glob(".step-*.tmp"), *self._folder.glob("step-*")]:
            if not (folder.name.startswith("step-") and (folder / _COMPLETE).is_file()):
                shutil.rmtree(folder, ignore_errors=True)

    def _check_model_identity(self, folder: Path, saved: dict[str, Any]) -> None:
        for key, value in self._model_identity.items():
            if saved.get(key) != value:
                raise UserError(
                    f"The checkpoint {folder} was made with `{key}` = {saved.get(key)!r}, but it is {value!r} now, so "
                    "it holds the state of another training: restore that value, or choose another `run_dir`."
                )

    def _check_data(self, folder: Path, saved: dict[str, Any]) -> None:
        for key, value in self._identity.items():
            if key not in saved:
                raise UserError(
                    f"The checkpoint {folder} is from an older version, which knew no `{key}`, so its position in the "
                    "data has no meaning: choose another `run_dir`."
                )
            if saved[key] != value:
                raise UserError(
                    f"The checkpoint {folder} was made with `{key}` = {saved[key]!r}, but it is {value!r} now, so "
                    "its position in the data has no meaning: restore that value, or choose another `run_dir`."
                )


def _name(step: int) -> str:
    return f"step-{step:07d}"


def is_checkpoint(path: str) -> bool:
    """Whether a path leads to a complete checkpoint, and not to a folder of a model."""
    return (Path(path) / _COMPLETE).is_file()


def config_of_checkpoint(folder: Path) -> RunConfig:
    """The configuration of the run that a checkpoint belongs to."""
    return load_config(folder / "config.yaml")


def load_checkpoint(path: str, device: torch.device, precision: str) -> TrainedVoxtral:
    """The model of a run as it was at a checkpoint, whole and in evaluation mode: to decode by one process alone.

    Args:
        path: of the folder of a complete checkpoint.
        device: that the model lies on.
        precision: as in `ModelConfig`; `auto` is the run's own.

    Raises:
        UserError: the checkpoint is damaged, or the weights that it was trained from are not what they were.
    """
    folder = Path(path)
    damage = _damage(folder)
    if damage is not None:
        raise UserError(damage)
    config, contents = config_of_checkpoint(folder), _read_complete(folder)
    if contents["model"] != _model_identity(config):
        raise UserError(
            f"The checkpoint {folder} holds what was trained, and not the frozen rest, but the weights of its "
            f"`model.path` ({config.model.path}) have changed since: restore them."
        )
    chosen = config.model if precision == "auto" else config.model.model_copy(update={"precision": precision})
    model = load_voxtral(chosen, config.trainable, config.seed)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for state in _read_states(folder, contents, with_moments=False):
            parameters[state.name].copy_(state.weight)
    model.to(device)
    model.eval()
    return model


def _data_identity(config: RunConfig, data_fingerprint: str) -> dict[str, Any]:
    """What the place in the data and what it holds depend on, as it reads back from JSON."""
    train_data = config.train_data.model_dump(mode="json", exclude=_WHERE_AND_HOW_FAST)
    if train_data["context"]:
        # A file that may move too: what it holds is part of the fingerprint.
        del train_data["context"]["words"]
    return {
        "seed": config.seed,
        "train_data.sets": {name: one.weight for name, one in config.train_data.sets.items()},
        **{f"train_data.{name}": value for name, value in train_data.items()},
        # Last, because it differs too where one of the others does, and they say more.
        "fingerprint of the shards, their index and the words of contexts": data_fingerprint,
    }


def _model_identity(config: RunConfig) -> dict[str, Any]:
    """What the stored parameters and moments belong to: frozen weights are not in a checkpoint."""
    return {
        "trainable": config.trainable.model_dump(mode="json"),
        "optimizer.algorithm": config.optimizer.algorithm,
        "fingerprint of the weights of model.path": fingerprint(config.model.path),
    }


class _PartWriter:
    """Takes every n-th parameter of a stream of states and writes it in parts of limited size."""

    def __init__(self, folder: Path, world: World) -> None:
        self._folder = folder
        self._world = world
        self._pending: dict[str, Tensor] = {}
        self._placed: dict[str, str] = {}
        self._num_parts = 0

    def write(self, states: Iterator[ParameterState]) -> dict[str, str]:
        """The names of the tensors that this rank wrote, each with its file."""
        for number, state in enumerate(states):
            if number % self._world.size == self._world.rank:
                self._pending.update(_tensors_of(state))
                if sum(tensor.nbytes for tensor in self._pending.values()) >= _PART_BYTES:
                    self._flush()
        self._flush()
        return self._placed

    def _flush(self) -> None:
        if not self._pending:
            return
        file = f"state-{self._world.rank:05d}-{self._num_parts:05d}.safetensors"
        save_file(self._pending, self._folder / file)
        self._placed.update(dict.fromkeys(self._pending, file))
        self._num_parts += 1
        self._pending = {}


def _tensors_of(state: ParameterState) -> dict[str, Tensor]:
    stored = {f"{state.name}//{key}": moment.contiguous() for key, moment in state.moments.items()}
    return {state.name: state.weight.contiguous()} | stored


def _read_complete(folder: Path) -> dict[str, Any]:
    contents: dict[str, Any] = json.loads((folder / _COMPLETE).read_text(encoding="utf-8"))
    return contents


def _damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, as a sentence; None if they are whole."""
    try:
        files = _read_complete(folder)["files"]
    except (ValueError, KeyError):
        return f"The checkpoint {folder} is damaged: its {_COMPLETE} cannot be read."
    for name, num_bytes in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else 0
        if found != num_bytes:
            return f"The checkpoint {folder} is damaged: {name} has {found} bytes instead of {num_bytes}."
    return None


def _to_disk(path: Path) -> None:
    """Wait until a file or the entries of a folder would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_model(folder: Path, saved: dict[str, list[int]], shapes: dict[str, tuple[int, ...]]) -> None:
    for name in [*shapes, *saved]:
        here, there = shapes.get(name), saved.get(name)
        if here is None or there is None or list(here) != there:
            raise UserError(
                f"The checkpoint {folder} belongs to another model: `{name}` is {_shape_text(there)} there and "
                f"{_shape_text(here)} in `model.path`. Choose another `run_dir`, or the model that it was made with."
            )


def _shape_text(shape: object) -> str:
    return "absent" if shape is None else "x".join(str(size) for size in shape)  # type: ignore[attr-defined]


def _read_states(folder: Path, contents: dict[str, Any], *, with_moments: bool = True) -> Iterator[ParameterState]:
    """The parameters of a checkpoint in the order of its shapes, whatever its layout."""
    if contents.get("layout", _WHOLE) == _SHARDS:
        yield from read_whole(folder, contents["shapes"], with_moments=with_moments)
        return
    files: dict[str, Any] = {name: safe_open(folder / name, framework="pt") for name in contents["files"]}
    placed: dict[str, str] = contents["tensors"]

    for name, keys in stored_moments(contents["shapes"], placed if with_moments else ()).items():
        assert name in placed, f"complete.json lists the shape of {name}, but no file holds it"
        read = {key: files[placed[f"{name}//{key}"]].get_tensor(f"{name}//{key}") for key in keys}
        yield ParameterState(name, files[placed[name]].get_tensor(name), read)
