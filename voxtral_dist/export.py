"""Export of the trained model as a Hugging Face folder, for transformers, vLLM and this package.

export/    the full model, with adapters merged into its weights
adapter/   only with adapters: the trained parameters in peft's format, to load on top of the initial model
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import VoxtralConfig, VoxtralForConditionalGeneration

from voxtral_dist.config import LoraConfig
from voxtral_dist.distributed.collectives import wait_for_all
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.engine import Engine
from voxtral_dist.model.adapters import is_trained, merge_adapters, save_adapters
from voxtral_dist.model.voxtral import fill_meta_model, meta_model, read_voxtral_config

# Files of a Voxtral folder that training does not change.
_COMPANION_FILES = (
    "tekken.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "params.json",
)


def export_trained(
    engine: Engine, model_path: str, lora: LoraConfig | None, dtype: torch.dtype, run_dir: Path, world: World
) -> None:
    """Write `export/` and, with adapters, `adapter/` into the folder of a run.

    All ranks call it together. Rank 0 collects the full weights on the CPU and writes them.

    Args:
        engine: the trained model.
        model_path: the initial model, whose configuration and tokenizer are copied.
        lora: section `trainable.lora`.
        dtype: precision of the weights in `export/`.
        run_dir: parent of the folders.
        world: all ranks.
    """
    weights = engine.weights()
    if world.is_first:
        _write(weights, model_path, lora, dtype, run_dir)
    else:
        for _ in weights:
            pass
    wait_for_all(world)


def _write(
    weights: Iterator[tuple[str, Tensor]], model_path: str, lora: LoraConfig | None, dtype: torch.dtype, run_dir: Path
) -> None:
    trained: dict[str, Tensor] = {}
    if lora is not None:
        weights = merge_adapters(_collecting(weights, lora, trained), lora)
    write_folder(assemble(read_voxtral_config(model_path), weights, dtype), model_path, run_dir / "export")
    if lora is not None:
        save_adapters(trained, lora, model_path, run_dir / "adapter")


def _collecting(
    weights: Iterator[tuple[str, Tensor]], lora: LoraConfig, trained: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Pass the weights through, and add the trained ones to `trained`."""
    for name, value in weights:
        if is_trained(name, lora):
            trained[name] = value
        yield name, value


def assemble(
    config: VoxtralConfig, weights: Iterator[tuple[str, Tensor]], dtype: torch.dtype
) -> VoxtralForConditionalGeneration:
    """Build a model on the CPU from weights in the order of its parameters."""
    model = meta_model(config)
    fill_meta_model(model, ((name, weight.to(dtype)) for name, weight in weights))
    model.config.dtype = dtype
    return model


def write_folder(model: VoxtralForConditionalGeneration, model_path: str, out_dir: Path) -> None:
    """Save under a temporary name and rename, so that `out_dir` is always complete."""
    temporary = out_dir.with_name(f".{out_dir.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    source = _local_folder(model_path)
    for name in _COMPANION_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, temporary / name)
    shutil.rmtree(out_dir, ignore_errors=True)
    temporary.rename(out_dir)


def _local_folder(model_path: str) -> Path:
    """The folder of a model's files: the path itself, or the hub's cache."""
    if Path(model_path).is_dir():
        return Path(model_path)
    return Path(snapshot_download(model_path, allow_patterns=list(_COMPANION_FILES)))
