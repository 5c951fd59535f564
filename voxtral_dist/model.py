"""Load Voxtral, whole or as a skeleton without weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import VoxtralConfig, VoxtralForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

from voxtral_dist.config import ModelConfig
from voxtral_dist.errors import UserError, first_line

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "auto": "auto"}


def load_voxtral(config: ModelConfig) -> VoxtralForConditionalGeneration:
    """The checkpoint's weights in the configured precision, ready to be trained.

    Raises:
        UserError: the path leads to no Voxtral checkpoint.
    """
    model = _load(config.path, dtype=_DTYPES[config.precision], attn_implementation=config.attention)
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def load_for_inference(path: str, device: torch.device, precision: str) -> VoxtralForConditionalGeneration:
    """A checkpoint as it is served: in evaluation mode, on the device; `auto` is the precision that it is stored in."""
    return _load(path, dtype=_DTYPES[precision]).to(device).eval()


def skeleton(config: VoxtralConfig) -> VoxtralForConditionalGeneration:
    """The modules of a Voxtral on the meta device: shapes without storage."""
    with torch.device("meta"):
        return VoxtralForConditionalGeneration(config)


def fill_skeleton(
    model: VoxtralForConditionalGeneration,
    weights: Iterable[tuple[str, Tensor]],
    buffers: Iterable[tuple[str, Tensor]] = (),
) -> None:
    """Give a skeleton its weights, which come in the order of its parameters, and copies of buffers.

    Each keeps its precision and device: rotary frequencies stay float32 in a bfloat16 model, as they are in training.
    """
    for (name, _), (weight_name, weight) in zip(list(model.named_parameters()), weights, strict=True):
        assert name == weight_name, f"weights come in the model's order, but {weight_name} came for {name}"
        _set(model, name, nn.Parameter(weight, requires_grad=False))
    for name, buffer in buffers:
        _set(model, name, buffer.clone())
    model.tie_weights()


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, value)


def _load(path: str, **arguments: Any) -> VoxtralForConditionalGeneration:
    # Every rank would draw a bar of its own through the display of the run.
    disable_progress_bar()
    try:
        kind = VoxtralConfig.get_config_dict(path)[0].get("model_type")
        if kind != VoxtralConfig.model_type:
            # transformers would warn, and fill a billion-parameter Voxtral with random numbers.
            raise ValueError(f"its config.json says model_type {kind!r}")
        return VoxtralForConditionalGeneration.from_pretrained(path, **arguments)
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(
            f"`model.path`: {path!r} cannot be loaded as a Voxtral ({type(error).__name__}: {first_line(error)})."
        ) from error
