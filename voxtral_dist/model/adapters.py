"""The export of trained adapters: merged into the weights that they adapt, and in peft's format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from voxtral_dist.config import Component, LoraConfig
from voxtral_dist.model.saving import save_tensors
from voxtral_dist.model.trainable import ADAPTER_NAME, component_of, is_adapter, peft_config

_BASE = ".base_layer."
_MAGNITUDE = ".lora_magnitude_vector."
_ADAPTER_SUFFIX = f".{ADAPTER_NAME}."
# peft's name for the model that adapters belong to.
_PEFT_PREFIX = "base_model.model."
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_MODULES: dict[Component, tuple[str, ...]] = {
    "encoder": ("audio_tower",),
    "projector": ("multi_modal_projector",),
    "language_model": ("language_model", "lm_head"),
}


def merge_adapters(weights: Iterable[tuple[str, Tensor]], lora: LoraConfig) -> Iterator[tuple[str, Tensor]]:
    """The named weights of an equivalent model without adapters.

    In float32: W + alpha / rank * B A (LoRA), with its rows scaled to the trained magnitudes (DoRA). The parameters of
    a layer come together, its own weight first, so that only one layer is held at a time.
    """
    layer = _Layer(lora)
    for name, value in weights:
        if is_adapter(name):
            layer.add(name, value)
            continue
        if not name.startswith(layer.prefix):
            yield from layer.merged()
            layer = _Layer(lora)
        if _BASE in name:
            layer.prefix = f"{name.partition(_BASE)[0]}."
            layer.own[name.replace(_BASE, ".")] = value
        else:
            yield name, value
    yield from layer.merged()


class _Layer:
    """The parameters of an adapted layer that were collected so far."""

    def __init__(self, lora: LoraConfig) -> None:
        self.prefix = ""
        self.own: dict[str, Tensor] = {}
        self._adapter: dict[str, Tensor] = {}
        self._scale = lora.alpha / lora.rank

    def add(self, name: str, value: Tensor) -> None:
        """Collect a parameter of the adapter: `A`, `B` or DoRA's magnitudes."""
        self._adapter[name.removeprefix(self.prefix).partition(".")[0]] = value

    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """The layer's own parameters, with the adapter merged into its weight."""
        for name, value in self.own.items():
            yield name, self._with_adapter(value) if name == f"{self.prefix}weight" else value

    def _with_adapter(self, weight: Tensor) -> Tensor:
        total = weight + self._scale * (self._adapter["lora_B"] @ self._adapter["lora_A"])
        if "lora_magnitude_vector" not in self._adapter:
            return total
        norms: Tensor = torch.linalg.vector_norm(total, dim=1)
        return total * (self._adapter["lora_magnitude_vector"] / norms)[:, None]


def save_adapters(trained: dict[str, Tensor], lora: LoraConfig, model_path: str, folder: Path) -> None:
    """Write all trained parameters, given by name, in the format of `PeftModel.from_pretrained`."""
    layers = [name.partition(".lora_A.")[0] for name in trained if ".lora_A." in name]
    described = adapter_config(lora, layers, model_path)
    described.modules_to_save = [module for part in lora.trained_whole for module in _MODULES[part]] or None
    folder.mkdir(parents=True, exist_ok=True)
    described.save_pretrained(folder)
    save_tensors({_peft_name(name): value.contiguous() for name, value in trained.items()}, folder / ADAPTER_WEIGHTS)


def adapter_config(lora: LoraConfig, layers: Sequence[str], model_path: str) -> Any:
    """peft's description of adapters for these layers of a model, to be stored beside their weights."""
    described = peft_config(lora, layers)
    described.base_model_name_or_path = model_path
    described.inference_mode = True
    # peft makes it a set, whose order in the file would differ from process to process.
    described.target_modules = sorted(layers)
    return described


def _peft_name(name: str) -> str:
    """peft's name of a parameter: without the adapter's name, and for magnitudes without `.weight`."""
    if not is_adapter(name):
        return _PEFT_PREFIX + name
    stored = name.replace(_ADAPTER_SUFFIX, ".")
    return _PEFT_PREFIX + (stored.removesuffix(".weight") if _MAGNITUDE in name else stored)


def is_trained(name: str, lora: LoraConfig) -> bool:
    """Whether a parameter belongs to an adapter, or to a component in `trained_whole`."""
    return is_adapter(name) or component_of(name) in lora.trained_whole
