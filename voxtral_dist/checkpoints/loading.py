"""A checkpoint as a model, without an engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from voxtral_dist.checkpoints.complete import COMPLETE, CompleteCheckpoint
from voxtral_dist.checkpoints.files import read_states
from voxtral_dist.checkpoints.identity import model_identity
from voxtral_dist.checkpoints.verifying import verified
from voxtral_dist.config import RunConfig, load_config
from voxtral_dist.errors import UserError
from voxtral_dist.model.precision import refuse_without_bfloat16
from voxtral_dist.model.voxtral import DTYPES, TrainedVoxtral, trained_meta_model
from voxtral_dist.model.weights import InitialWeights, load_voxtral


def is_checkpoint(path: str) -> bool:
    """Whether a path is a complete checkpoint of a run, as opposed to a model folder."""
    return (Path(path) / COMPLETE).is_file()


def config_of_checkpoint(folder: Path) -> RunConfig:
    """The configuration of the run that wrote a checkpoint."""
    return load_config(folder / "config.yaml")


def refuse_ema(path: str, ema: bool | None) -> None:
    """Refuse the choice between averages and weights for a model folder, which holds one of them.

    Raises:
        UserError: the choice was made.
    """
    if ema is not None:
        raise UserError(f"`--ema` and `--no-ema` need a checkpoint of a run, but {path} is none: leave them out.")


def load_checkpoint(path: str, device: torch.device, precision: str, ema: bool | None = None) -> TrainedVoxtral:
    """The full model at a checkpoint, in evaluation mode, loaded by a single process.

    Args:
        path: the folder of a complete checkpoint.
        device: the model's device.
        precision: as in `ModelConfig`, or `auto` for the precision of the run.
        ema: see `EvaluationConfig`.

    Raises:
        UserError: the checkpoint is damaged, the initial weights of its run have changed, averages are asked for
            that it has not, or the device has no bfloat16.
    """
    folder = Path(path)
    config, contents = _checked(folder)
    chosen = config.model.without_float8
    if precision != "auto":
        chosen = chosen.model_copy(update={"precision": precision})
    refuse_without_bfloat16(chosen.precision, device)
    model = load_voxtral(chosen, config.trainable, config.seed)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in _trained_weights(folder, config, contents, ema):
            parameters[name].copy_(weight)
    model.to(device)
    model.eval()
    return model


def checkpoint_weights(path: str, ema: bool | None = None) -> Iterator[tuple[str, Tensor]]:
    """All parameters of a checkpoint's model by name, in its order, one at a time on the CPU: as `Engine.weights`.

    Trained parameters are float32, frozen ones have their stored precision; quantized ones are as they were before.
    For `ema` see `EvaluationConfig`.

    Raises:
        UserError: see `load_checkpoint`.
    """
    folder = Path(path)
    config, contents = _checked(folder)
    model = trained_meta_model(config.model.without_float8, config.trainable, DTYPES[config.model.precision])
    initial = InitialWeights(config.model.path, model, config.seed)
    trained = _trained_weights(folder, config, contents, ema)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            unquantized = initial.unquantized(name)
            yield name, initial(name) if unquantized is None else unquantized
            continue
        trained_name, weight = next(trained)
        assert trained_name == name, f"weights come in the model's order, but {trained_name} came for {name}"
        yield name, weight


def _trained_weights(
    folder: Path, config: RunConfig, contents: CompleteCheckpoint, ema: bool | None
) -> Iterator[tuple[str, Tensor]]:
    """The trained parameters of a checkpoint, or their averages."""
    with_averages = config.evaluation.ema is not False if ema is None else ema
    for state in read_states(folder, contents, with_moments=False, with_averages=with_averages):
        if ema and state.average is None:
            raise UserError(
                f"The checkpoint {folder} has no moving averages, because its run had no `optimizer.ema_decay`: leave "
                "out `--ema`."
            )
        yield state.name, state.weight if state.average is None else state.average


def _checked(folder: Path) -> tuple[RunConfig, CompleteCheckpoint]:
    """The configuration and the contents of an intact checkpoint whose initial weights are still there."""
    contents = verified(folder)
    config = config_of_checkpoint(folder)
    if contents.model != model_identity(config):
        raise UserError(
            f"The checkpoint {folder} holds trained parameters only, and the weights of its `model.path` "
            f"({config.model.path}), which hold the frozen ones, have changed since: restore them."
        )
    return config, contents
