"""Export of the trained model for what serves it: transformers, vLLM, peft, llama.cpp and this package.

A run writes at its end, into its own folder:

export/           the full model for transformers, with adapters merged into its weights
export-mistral/   the same in Mistral's native layout, which vLLM loads
adapter/          only with adapters: the trained parameters in peft's format, to load on top of the initial model
adapter-vllm/     the same in the names that vLLM looks for, where vLLM can serve them

Each has a model card, `README.md`. `voxtral-dist export` writes any of them from a run, a checkpoint or a model folder,
and pushes it to the Hugging Face hub.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from voxtral_dist.checkpoints.complete import read_complete
from voxtral_dist.checkpoints.directory import checkpoint_folder, checkpoint_of_run
from voxtral_dist.checkpoints.loading import checkpoint_weights, config_of_checkpoint, is_checkpoint, refuse_ema
from voxtral_dist.config import CardConfig, LoraConfig, RunConfig, load_config
from voxtral_dist.distributed.collectives import PatientSum
from voxtral_dist.distributed.standing import advancing
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.engine import Engine
from voxtral_dist.errors import UserError
from voxtral_dist.exports.adapter_folders import (
    refuse_unservable,
    refuse_without_effect,
    vllm_refusal,
    write_vllm_adapter,
)
from voxtral_dist.exports.folders import (
    refuse_inside_model,
    refuse_to_replace_others,
    replaced_folder,
    write_card,
)
from voxtral_dist.exports.layouts import ADAPTER_LAYOUTS, AdapterLayout, ExportLayout
from voxtral_dist.exports.model_folders import BaseModel, write_model_folders
from voxtral_dist.files import DISK_ERRORS, refuse_unwritable, write_errors_named
from voxtral_dist.hub.model_card import CardSubject, model_card
from voxtral_dist.hub.repository import Destination, HubRepository
from voxtral_dist.hub.trained_run import TrainedRun
from voxtral_dist.model.adapters import is_trained, merge_adapters, save_adapters
from voxtral_dist.model.voxtral import DTYPES, meta_model, read_voxtral_config
from voxtral_dist.model.weights import InitialWeights
from voxtral_dist.output.counting import counted
from voxtral_dist.training.selection import selected_step
from voxtral_dist.training.summary import exported_step

Precision = Literal["auto", "float32", "bfloat16", "float16"]
Weights = Iterator[tuple[str, Tensor]]
# What the card says, and a function that writes the folder, given that and the card's text.
_Job = tuple[CardSubject, Callable[[CardSubject, str], None]]

_FOLDERS: dict[ExportLayout, str] = {
    "hf": "export",
    "mistral": "export-mistral",
    "peft": "adapter",
    "vllm-lora": "adapter-vllm",
}
logger = logging.getLogger(__name__)


def export_trained(engine: Engine, config: RunConfig, world: World, step: int) -> None:
    """Write the folders of a run's end.

    All ranks call it together. Rank 0 collects the full weights on the CPU and writes them.

    Args:
        engine: the trained model.
        config: of the run.
        world: all ranks.
        step: the step whose weights the engine has.

    Raises:
        UserError: the adapters change nothing.
        WriteError: on rank 0; the disk is full, for example.
    """
    arrive = PatientSum(world)
    weights = advancing(engine.weights())
    if world.is_first:
        with write_errors_named("The exported model", config.run_dir, DISK_ERRORS):
            _write(weights, config, step)
    else:
        for _ in weights:
            pass
    # Rank 0 writes the last file.
    arrive(0)


def export(
    source: str,
    out: Path,
    layout: ExportLayout,
    precision: Precision = "auto",
    ema: bool | None = None,
    card: CardConfig | None = None,
    destination: Destination | None = None,
) -> HubRepository | None:
    """Write one layout of a model with its card, and push it if asked to.

    Args:
        source: the folder of a run, whose selected or else newest checkpoint is taken; a checkpoint; or a model folder
            or hub name in any layout.
        out: the folder; an older export there is replaced.
        layout: of the folder. The adapters' layouts need a run with adapters, or a checkpoint of it.
        precision: of the full model's weights; `auto` is that of the run or folder, and bfloat16 for float16.
        ema: of a run or checkpoint, its moving averages (true) or the weights of its step; None: as its run evaluates.
        card: values that are set go before those of the run.
        destination: where to push the folder; None pushes nothing.

    Returns:
        The repository that it was pushed to.

    Raises:
        UserError: there is nothing to export there, or not in this layout; or the hub refuses.
        WriteError: the disk is full, for example.
    """
    refuse_unwritable("OUT", out.parent)
    refuse_to_replace_others("OUT", out)
    checkpoint = _checkpoint_of(source)
    if checkpoint is None:
        refuse_ema(source, ema)
        subject, write = _of_folder(source, out.resolve(), layout, precision)
    else:
        subject, write = _of_checkpoint(checkpoint, source, out.resolve(), layout, precision, ema)
    if card is not None:
        stated = subject.settings.model_copy(update=card.model_dump(exclude_defaults=True))
        subject = replace(subject, settings=stated)
    if destination is None:
        with write_errors_named("The exported model", out, DISK_ERRORS):
            write(subject, model_card(subject))
        return None
    subject = replace(subject, repository=destination.name)
    if subject.is_adapter and subject.base is None:
        raise UserError(
            "`--push`: adapters name their base model, but the `model.path` of the run is a folder of this machine: "
            "add `--base-model USER/NAME`."
        )
    repository = HubRepository.opened(destination)
    text = model_card(subject)
    repository.check_card(text)
    with write_errors_named("The exported model", out, DISK_ERRORS):
        write(subject, text)
    repository.upload(out, layout)
    return repository


def export_dtype(precision: Precision, own: torch.dtype) -> torch.dtype:
    """Precision of an export's weights.

    Args:
        precision: as asked for. `auto` is the model's own if it is float32, else bfloat16, which every GPU that serves
            Voxtral computes in.
        own: precision of the run or of the model folder.
    """
    if precision != "auto":
        return DTYPES[precision]
    return torch.float32 if own is torch.float32 else torch.bfloat16


def serving_notes(config: RunConfig) -> list[str]:
    """What the exports of a run cannot do, to be said at its start."""
    notes = []
    refusal = None if config.trainable.lora is None else vllm_refusal(config.trainable.lora)
    if refusal is not None:
        notes.append(
            f"{refusal}: its adapters alone cannot be served there, the merged model in `export-mistral/` can."
        )
    limit = int(read_voxtral_config(config.model.path).text_config.max_position_embeddings)
    if config.model.max_positions is not None and config.model.max_positions > limit:
        notes.append(
            f"`model.max_positions` is {config.model.max_positions}, but the model was trained for "
            f"{counted(limit, 'position')}: compare error rates of long audio with those before training, and note "
            "that vLLM serves no more."
        )
    return notes


def _write(weights: Weights, config: RunConfig, step: int) -> None:
    lora, path = config.trainable.lora, config.model.path
    dtype = export_dtype("auto", DTYPES[config.model.precision])
    cards = _cards(config, step, str(dtype).removeprefix("torch."))
    trained: dict[str, Tensor] = {}
    if lora is not None:
        weights = merge_adapters(_collecting(weights, lora, trained), lora)
    folders = {layout: config.run_dir / _FOLDERS[layout] for layout in config.export.layouts}
    texts = {layout: cards.get(layout) for layout in folders}
    write_model_folders(weights, BaseModel.from_pretrained(path), dtype, folders, texts)
    if lora is not None:
        refuse_without_effect(trained)
        for layout in ADAPTER_LAYOUTS:
            if layout == "peft" or vllm_refusal(lora) is None:
                _write_adapter(trained, lora, path, config.run_dir / _FOLDERS[layout], layout, cards.get(layout))


def _cards(config: RunConfig, step: int, precision: str) -> dict[ExportLayout, str]:
    """The cards at the end of a run; none if they cannot be written, because the model is trained either way."""
    layouts = (*config.export.layouts, *(ADAPTER_LAYOUTS if config.trainable.lora else ()))
    try:
        run = TrainedRun.read(config, config.run_dir, step)
        subject = CardSubject("hf", precision, config.model.path, config.export.card, run=run)
        return {layout: model_card(replace(subject, layout=layout)) for layout in layouts}
    except Exception as error:
        logger.warning(
            "The model cards could not be written (%s: %s): fix that, then run `voxtral-dist export %s OUT`.",
            type(error).__name__,
            error,
            config.run_dir,
        )
        return {}


def _write_adapter(
    trained: dict[str, Tensor], lora: LoraConfig, base: str, out: Path, layout: AdapterLayout, card: str | None
) -> None:
    with replaced_folder(out) as folder:
        (save_adapters if layout == "peft" else write_vllm_adapter)(trained, lora, base, folder)
        write_card(folder, card)


def _of_checkpoint(
    checkpoint: Path, source: str, out: Path, layout: ExportLayout, precision: Precision, ema: bool | None
) -> _Job:
    """The export of a checkpoint of a run."""
    config = config_of_checkpoint(checkpoint)
    lora, path = config.trainable.lora, config.model.path
    refuse_inside_model("OUT", out, Path(path))
    dtype = export_dtype(precision, DTYPES[config.model.precision])
    if lora is None and layout in ADAPTER_LAYOUTS:
        raise UserError(f"{source} was trained without adapters (`trainable.lora`): choose hf or mistral.")
    if lora is not None and layout == "vllm-lora":
        refuse_unservable(lora)
    step = read_complete(checkpoint).progress.step
    run_dir = checkpoint.resolve().parents[1]
    is_in_run = checkpoint_folder(run_dir, step) == checkpoint.resolve()
    run = TrainedRun.read(config, run_dir if is_in_run else None, step, ema)

    def write(subject: CardSubject, card: str) -> None:
        weights = checkpoint_weights(str(checkpoint), ema)
        match layout:
            case "hf" | "mistral":
                merged = weights if lora is None else merge_adapters(_with_effect(weights, lora), lora)
                write_model_folders(merged, BaseModel.from_pretrained(path), dtype, {layout: out}, {layout: card})
            case "peft" | "vllm-lora":
                assert lora is not None, "refused above"
                trained = {name: value for name, value in weights if is_trained(name, lora)}
                refuse_without_effect(trained)
                base = path if subject.repository is None else subject.base or path
                _write_adapter(trained, lora, base, out, layout, card)

    subject = CardSubject(layout, str(dtype).removeprefix("torch."), path, config.export.card, run=run)
    return subject, write


def _of_folder(source: str, out: Path, layout: ExportLayout, precision: Precision) -> _Job:
    """The export of a model folder in another layout or precision, one tensor at a time."""
    if layout == "peft" or layout == "vllm-lora":
        raise UserError(f"{source} is not a run or a checkpoint of one, so it has no adapters: choose hf or mistral.")
    base = BaseModel.from_pretrained(source)
    refuse_inside_model("OUT", out, base.folder)
    dtype = export_dtype(precision, base.config.dtype)

    def write(_: CardSubject, card: str) -> None:
        stored = InitialWeights(source, meta_model(base.config), seed=0)
        weights = ((name, stored(name)) for name in base.shapes)
        write_model_folders(weights, base, dtype, {layout: out}, {layout: card})

    subject = CardSubject(layout, str(dtype).removeprefix("torch."), source)
    run = _run_that_wrote(Path(source))
    if run is not None:
        subject = replace(subject, base_path=run.config.model.path, settings=run.config.export.card, run=run)
    return subject, write


def _run_that_wrote(folder: Path) -> TrainedRun | None:
    """The finished run whose export a folder is; None for other folders."""
    run_dir = folder.resolve().parent
    step = exported_step(run_dir)
    if folder.resolve().name not in _FOLDERS.values() or step is None:
        return None
    return TrainedRun.read(load_config(run_dir / "config.yaml"), run_dir, step)


def _checkpoint_of(source: str) -> Path | None:
    """The checkpoint that a path names or a run selected; None for a model folder or hub name."""
    if is_checkpoint(source):
        return Path(source)
    return checkpoint_of_run(Path(source), selected_step(Path(source)))


def _with_effect(weights: Weights, lora: LoraConfig) -> Weights:
    """Pass the weights through, and refuse them at their end if training left the model as it was."""
    trained: dict[str, Tensor] = {}
    yield from _collecting(weights, lora, trained)
    refuse_without_effect(trained)


def _collecting(weights: Weights, lora: LoraConfig, trained: dict[str, Tensor]) -> Weights:
    """Pass the weights through, and add the trained ones to `trained`."""
    for name, value in weights:
        if is_trained(name, lora):
            trained[name] = value
        yield name, value
