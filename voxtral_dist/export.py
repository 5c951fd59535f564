"""Export of the trained model for what serves it: transformers, vLLM, peft, llama.cpp and this package.

A run writes at its end, into its own folder:

export/           the full model for transformers, with adapters merged into its weights
export-mistral/   the same in Mistral's native layout, which vLLM loads
adapter/          only with adapters: the trained parameters in peft's format, to load on top of the initial model
adapter-vllm/     the same in the names that vLLM looks for, where vLLM can serve them

`voxtral-dist export` writes any of them from a run, a checkpoint or a model folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from voxtral_dist.checkpoints.directory import checkpoint_of_run
from voxtral_dist.checkpoints.loading import checkpoint_weights, config_of_checkpoint, is_checkpoint, refuse_ema
from voxtral_dist.config import LoraConfig, RunConfig
from voxtral_dist.distributed.collectives import PatientSum
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.engine import Engine
from voxtral_dist.errors import UserError
from voxtral_dist.exports.adapter_folders import refuse_without_effect, vllm_refusal, write_vllm_adapter
from voxtral_dist.exports.model_folders import BaseModel, Layout, write_model_folders
from voxtral_dist.files import DISK_ERRORS, refuse_unwritable, write_errors_named
from voxtral_dist.model.adapters import is_trained, merge_adapters, save_adapters
from voxtral_dist.model.voxtral import DTYPES, meta_model, read_voxtral_config
from voxtral_dist.model.weights import InitialWeights
from voxtral_dist.training.selection import selected_step

ExportLayout = Literal["hf", "mistral", "peft", "vllm-lora"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Weights = Iterator[tuple[str, Tensor]]

_MODEL_FOLDERS: dict[Layout, str] = {"hf": "export", "mistral": "export-mistral"}


def export_trained(engine: Engine, config: RunConfig, world: World) -> None:
    """Write the folders of a run's end.

    All ranks call it together. Rank 0 collects the full weights on the CPU and writes them.

    Args:
        engine: the trained model.
        config: of the run.
        world: all ranks.

    Raises:
        UserError: the adapters change nothing.
        WriteError: on rank 0; the disk is full, for example.
    """
    arrive = PatientSum(world)
    weights = engine.weights()
    if world.is_first:
        with write_errors_named("The exported model", config.run_dir, DISK_ERRORS):
            _write(weights, config)
    else:
        for _ in weights:
            pass
    # Rank 0 writes the last file.
    arrive(0)


def export(
    source: str, out: Path, layout: ExportLayout, precision: Precision = "auto", ema: bool | None = None
) -> None:
    """Write one layout of a model.

    Args:
        source: the folder of a run, whose selected or else newest checkpoint is taken; a checkpoint; or a model folder
            or hub name in any layout.
        out: the folder, which is replaced.
        layout: of the folder. The adapters' layouts need a run with adapters, or a checkpoint of it.
        precision: of the full model's weights; `auto` is that of the run or folder, and bfloat16 for float16.
        ema: of a run or checkpoint, its moving averages (true) or the weights of its step; None: as its run evaluates.

    Raises:
        UserError: there is nothing to export there, or not in this layout.
        WriteError: the disk is full, for example.
    """
    refuse_unwritable("OUT", out.parent)
    with write_errors_named("The exported model", out, DISK_ERRORS):
        _export(source, out, layout, precision, ema)


def _export(source: str, out: Path, layout: ExportLayout, precision: Precision, ema: bool | None) -> None:
    checkpoint = _checkpoint_of(source)
    if checkpoint is None:
        refuse_ema(source, ema)
        _export_folder(source, out, layout, precision)
        return
    config = config_of_checkpoint(checkpoint)
    lora, path = config.trainable.lora, config.model.path
    weights = checkpoint_weights(str(checkpoint), ema)
    match layout:
        case "hf" | "mistral":
            merged = weights if lora is None else merge_adapters(weights, lora)
            dtype = export_dtype(config) if precision == "auto" else DTYPES[precision]
            write_model_folders(merged, BaseModel.from_pretrained(path), dtype, {layout: out})
        case "peft" | "vllm-lora":
            if lora is None:
                raise UserError(f"{source} was trained without adapters (`trainable.lora`): choose hf or mistral.")
            trained = {name: value for name, value in weights if is_trained(name, lora)}
            refuse_without_effect(trained)
            (save_adapters if layout == "peft" else write_vllm_adapter)(trained, lora, path, out)


def export_dtype(config: RunConfig) -> torch.dtype:
    """Precision of a run's export: float32 or bfloat16, which every GPU that serves Voxtral computes in."""
    return torch.float32 if config.model.precision == "float32" else torch.bfloat16


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
            f"`model.max_positions` is {config.model.max_positions}, but the model was trained for {limit} positions: "
            "compare error rates of long audio with those before training, and note that vLLM serves no more."
        )
    return notes


def _write(weights: Weights, config: RunConfig) -> None:
    lora, path = config.trainable.lora, config.model.path
    trained: dict[str, Tensor] = {}
    if lora is not None:
        weights = merge_adapters(_collecting(weights, lora, trained), lora)
    folders = {layout: config.run_dir / _MODEL_FOLDERS[layout] for layout in config.export.layouts}
    write_model_folders(weights, BaseModel.from_pretrained(path), export_dtype(config), folders)
    if lora is not None:
        refuse_without_effect(trained)
        save_adapters(trained, lora, path, config.run_dir / "adapter")
        if vllm_refusal(lora) is None:
            write_vllm_adapter(trained, lora, path, config.run_dir / "adapter-vllm")


def _export_folder(source: str, out: Path, layout: ExportLayout, precision: Precision) -> None:
    """Write a model folder in another layout or precision, one tensor at a time."""
    if layout == "peft" or layout == "vllm-lora":
        raise UserError(f"{source} is not a run or a checkpoint of one, so it has no adapters: choose hf or mistral.")
    base = BaseModel.from_pretrained(source)
    if out.resolve() == base.folder.resolve():
        raise UserError(f"OUT: {out} is the model that would be read: choose another folder.")
    stored = InitialWeights(source, meta_model(base.config), seed=0)
    dtype = DTYPES[precision] if precision != "auto" else _stored_dtype(base)
    write_model_folders(((name, stored(name)) for name in base.shapes), base, dtype, {layout: out})


def _stored_dtype(base: BaseModel) -> torch.dtype:
    return torch.float32 if base.config.dtype is torch.float32 else torch.bfloat16


def _checkpoint_of(source: str) -> Path | None:
    """The checkpoint that a path names or a run selected; None for a model folder or hub name."""
    if is_checkpoint(source):
        return Path(source)
    return checkpoint_of_run(Path(source), selected_step(Path(source)))


def _collecting(weights: Weights, lora: LoraConfig, trained: dict[str, Tensor]) -> Weights:
    """Pass the weights through, and add the trained ones to `trained`."""
    for name, value in weights:
        if is_trained(name, lora):
            trained[name] = value
        yield name, value
