"""Load Voxtral, whole or as a skeleton without weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import VoxtralConfig, VoxtralForConditionalGeneration

from voxtral_dist.config import ModelConfig
from voxtral_dist.errors import UserError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_voxtral(config: ModelConfig) -> VoxtralForConditionalGeneration:
    """The checkpoint's weights in the configured precision, ready to be trained.

    Raises:
        UserError: the path leads to no Voxtral checkpoint.
    """
    _check_is_voxtral(config.path)
    try:
        model = VoxtralForConditionalGeneration.from_pretrained(
            config.path, dtype=_DTYPES[config.precision], attn_implementation=config.attention
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"`model.path`: {config.path!r} cannot be loaded: {_first_line(error)}") from error
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.text_config.use_cache = False
    return model.train()


def load_for_inference(path: str, device: torch.device, precision: str) -> VoxtralForConditionalGeneration:
    """A checkpoint as it is served: in evaluation mode, on the device."""
    _check_is_voxtral(path)
    model = VoxtralForConditionalGeneration.from_pretrained(path, dtype=_DTYPES[precision])
    return model.to(device).eval()


def skeleton(config: VoxtralConfig, dtype: torch.dtype) -> VoxtralForConditionalGeneration:
    """The modules of a Voxtral on the meta device: shapes without storage."""
    with torch.device("meta"):
        return VoxtralForConditionalGeneration(config).to(dtype)


def copy_buffers(source: nn.Module, target: nn.Module) -> None:
    """Copy what is not a parameter, such as rotary frequencies, between models of the same shape."""
    buffers = dict(source.named_buffers())
    for name, buffer in target.named_buffers():
        buffer.copy_(buffers[name])


def _check_is_voxtral(path: str) -> None:
    folder = Path(path)
    looks_local = folder.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1
    if looks_local and not folder.is_dir():
        raise UserError(f"`model.path`: the folder {path} does not exist: give a Voxtral folder or a hub name.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"`model.path`: {path} has no config.json, so it is not a Hugging Face folder.")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
