"""The trained model as a normal Hugging Face folder, which transformers, vLLM and this package load alike.

export/    the whole model; adapters are merged into the weights that they are beside
adapter/   what was trained with adapters, as peft stores it: small, for the model that training began with
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import VoxtralConfig, VoxtralForConditionalGeneration

from voxtral_dist.config import LoraConfig, RunConfig
from voxtral_dist.distributed.collectives import wait_for_all
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.engine import Engine
from voxtral_dist.model.adapters import is_trained, merge_adapters, save_adapters
from voxtral_dist.model.voxtral import fill_meta_model, meta_model, read_voxtral_config

# Everything in a Voxtral folder that training does not change.
_COMPANION_FILES = (
    "tekken.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "params.json",
)


def export_trained(engine: Engine, config: RunConfig, dtype: torch.dtype, world: World) -> None:
    """Write the folders above into `run_dir`, the weights of `export` in `dtype`.

    All ranks call it together; rank 0 holds one copy of the weights on the CPU and writes.
    """
    weights = engine.weights()
    if world.is_first:
        _write(weights, config, dtype)
    else:
        for _ in weights:
            pass
    wait_for_all(world)


def _write(weights: Iterator[tuple[str, Tensor]], config: RunConfig, dtype: torch.dtype) -> None:
    path, lora = config.model.path, config.trainable.lora
    trained: dict[str, Tensor] = {}
    if lora is not None:
        weights = merge_adapters(_collecting(weights, lora, trained), lora)
    write_folder(assemble(read_voxtral_config(path), weights, dtype), path, config.run_dir / "export")
    if lora is not None:
        save_adapters(trained, lora, path, config.run_dir / "adapter")


def _collecting(
    weights: Iterator[tuple[str, Tensor]], lora: LoraConfig, trained: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The same weights, of which those that were trained are kept too."""
    for name, value in weights:
        if is_trained(name, lora):
            trained[name] = value
        yield name, value


def assemble(
    config: VoxtralConfig, weights: Iterator[tuple[str, Tensor]], dtype: torch.dtype
) -> VoxtralForConditionalGeneration:
    """A model on the CPU with weights that come in the order of its parameters."""
    model = meta_model(config)
    fill_meta_model(model, ((name, weight.to(dtype)) for name, weight in weights))
    model.config.dtype = dtype
    return model


def write_folder(model: VoxtralForConditionalGeneration, model_path: str, out_dir: Path) -> None:
    """Save under a temporary name, so that a folder named `out_dir` is always a whole one."""
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
    """Where the files of the checkpoint lie: a folder as it is, a hub name in the cache."""
    if Path(model_path).is_dir():
        return Path(model_path)
    return Path(snapshot_download(model_path, allow_patterns=list(_COMPANION_FILES)))
