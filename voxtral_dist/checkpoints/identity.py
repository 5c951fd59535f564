"""The data and the model that a checkpoint belongs to, and the refusal to resume a run with others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from voxtral_dist.config import RunConfig
from voxtral_dist.errors import UserError
from voxtral_dist.model.weights import fingerprint
from voxtral_dist.text.steps import step_labels

# Keys of `train_data` that change neither the utterances drawn nor their order. Shards may move: the fingerprint
# identifies them.
_WITHOUT_EFFECT_ON_ORDER = {"shards", "sets", "num_workers", "max_bad_fraction", "max_bad_in_a_row", "too_long"}


def data_identity(config: RunConfig, data_fingerprint: str) -> dict[str, Any]:
    """Everything that determines the training data and its order, in types that JSON returns unchanged.

    Raises:
        UserError: a text step of the user cannot be used.
    """
    train_data = config.train_data.model_dump(mode="json", exclude=_WITHOUT_EFFECT_ON_ORDER)
    # The user's functions have their versions here.
    train_data["target_text"] = step_labels(config.train_data.target_text)
    if train_data["context"]:
        # This file may move too; the fingerprint covers its contents.
        del train_data["context"]["words"]
    return {
        "seed": config.seed,
        "train_data.sets": {name: one.weight for name, one in config.train_data.sets.items()},
        **{f"train_data.{name}": value for name, value in train_data.items()},
        # Last, because it also changes with some of the others, whose names say more.
        "fingerprint of the shards, their index and the context word list": data_fingerprint,
    }


def model_identity(config: RunConfig) -> dict[str, Any]:
    """Everything that determines what the stored parameters and moments mean; frozen weights are not stored."""
    trainable = config.trainable.model_dump(mode="json")
    if trainable["lora"] and not trainable["lora"]["quantized"]:
        # As in checkpoints from before there was this setting.
        del trainable["lora"]["quantized"]
    return {
        "trainable": trainable,
        # The moments of `adamw_8bit` are converted to those of `adamw`, and back.
        "optimizer.algorithm": config.optimizer.algorithm.removesuffix("_8bit"),
        "fingerprint of the weights of model.path": fingerprint(config.model.path),
    }


def refuse_other_data(folder: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of other training data.

    Raises:
        UserError: a value of `data_identity` differs.
    """
    _refuse_difference(folder, saved, current, "its position in the data has no meaning")


def refuse_other_training(folder: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of other initial weights, other trained parameters or another optimizer.

    Raises:
        UserError: a value of `model_identity` differs.
    """
    _refuse_difference(folder, saved, current, "it holds the state of another training")


def refuse_other_shapes(folder: Path, saved: Mapping[str, Sequence[int]], current: Mapping[str, Sequence[int]]) -> None:
    """Refuse a checkpoint whose trained parameters have other names or shapes.

    Raises:
        UserError: a parameter is missing on one side, or its shape differs.
    """
    for name in [*current, *saved]:
        here, there = current.get(name), saved.get(name)
        if here is None or there is None or list(here) != list(there):
            raise UserError(
                f"The checkpoint {folder} belongs to another model: `{name}` is {_shape_text(there)} there and "
                f"{_shape_text(here)} in `model.path`. Choose another `run_dir`, or restore the model it was made with."
            )


def _refuse_difference(folder: Path, saved: Mapping[str, Any], current: Mapping[str, Any], consequence: str) -> None:
    for key, value in current.items():
        if key not in saved or saved[key] != value:
            then = f"`{key}` = {saved[key]!r}" if key in saved else f"no `{key}`"
            raise UserError(
                f"The checkpoint {folder} was made with {then}, but it is {value!r} now, so {consequence}: restore "
                "that value, or choose another `run_dir`."
            )


def _shape_text(shape: Sequence[int] | None) -> str:
    return "absent" if shape is None else "x".join(str(size) for size in shape)
