"""Load Voxtral, whole or as a skeleton without weights."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import VoxtralConfig, VoxtralForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

from voxtral_dist.config import ModelConfig
from voxtral_dist.errors import UserError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
    """A checkpoint as it is served: in evaluation mode, on the device."""
    return _load(path, dtype=_DTYPES[precision]).to(device).eval()


def skeleton(config: VoxtralConfig, dtype: torch.dtype) -> VoxtralForConditionalGeneration:
    """The modules of a Voxtral on the meta device: shapes without storage."""
    with torch.device("meta"):
        return VoxtralForConditionalGeneration(config).to(dtype)


def copy_buffers(source: nn.Module, target: nn.Module) -> None:
    """Copy what is not a parameter, such as rotary frequencies, between models of the same shape."""
    buffers = dict(source.named_buffers())
    for name, buffer in target.named_buffers():
        buffer.copy_(buffers[name])


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
            f"`model.path`: {path!r} cannot be loaded as a Voxtral ({type(error).__name__}: {_first_line(error)})."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
