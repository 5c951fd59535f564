"""Export of the trained model for what serves it: transformers, vLLM, peft, and this package.

export/           the full model for transformers, with adapters merged into its weights
export-mistral/   the same in Mistral's native layout, which vLLM loads
adapter/          only with adapters: the trained parameters in peft's format, to load on top of the initial model
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from voxtral_dist.config import LoraConfig
from voxtral_dist.distributed.collectives import wait_for_all
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.engine import Engine
from voxtral_dist.exports.model_folders import BaseModel, Layout, write_model_folders
from voxtral_dist.model.adapters import is_trained, merge_adapters, save_adapters


def export_trained(
    engine: Engine, model_path: str, lora: LoraConfig | None, dtype: torch.dtype, run_dir: Path, world: World
) -> None:
    """Write `export/`, `export-mistral/` and, with adapters, `adapter/` into the folder of a run.

    All ranks call it together. Rank 0 collects the full weights on the CPU and writes them.

    Args:
        engine: the trained model.
        model_path: the initial model, whose configuration and tokenizer are copied.
        lora: section `trainable.lora`.
        dtype: precision of the full model's weights.
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
    folders: dict[Layout, Path] = {"hf": run_dir / "export", "mistral": run_dir / "export-mistral"}
    write_model_folders(weights, BaseModel.from_pretrained(model_path), dtype, folders)
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
