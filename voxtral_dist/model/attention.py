"""Attention kernels: which one a run uses, and what keeps cuDNN's kernel out of the language model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from voxtral_dist.config import ModelConfig
from voxtral_dist.errors import UserError

# FlashAttention's kernels need a GPU of this generation (Ampere) or newer.
_FLASH_CAPABILITY = (8, 0)


def chosen_attention(config: ModelConfig) -> str:
    """The attention kernel that `model.attention` selects on this machine.

    Raises:
        UserError: FlashAttention is configured, but not available.
    """
    if config.attention == "flash_attention_2" and not (
        find_spec("flash_attn") is not None
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() >= _FLASH_CAPABILITY
        and config.precision != "float32"
    ):
        raise UserError(
            "`model.attention` is `flash_attention_2`, which needs the package flash-attn, a GPU of the Ampere "
            "generation or newer and half precision: set it to `auto`."
        )
    return "sdpa" if config.attention == "auto" else config.attention


@contextmanager
def masked_attention(model: nn.Module) -> Iterator[None]:
    """Context in which a Voxtral takes attention masks, such as those of prompts padded on the left.

    torch's kernels take the place of FlashAttention, which would remove the padding in every layer and wait for the GPU
    to count it, and cuDNN's kernel is off, see `without_cudnn`.
    """
    text_config: Any = model.get_submodule("model.language_model").config
    chosen = text_config._attn_implementation
    if chosen == "flash_attention_2":
        text_config._attn_implementation = "sdpa"
    try:
        with without_cudnn():
            yield
    finally:
        text_config._attn_implementation = chosen


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Context in which torch's scaled dot product attention does not use cuDNN's kernel.

    torch (2.11 to 2.14) prefers it on Hopper and Blackwell. It builds a plan for every new shape, of which speech has
    many, and its backward pass gives NaN for explicit masks at some lengths (pytorch/pytorch#196678).
    """
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)


def causal_mask(hidden: Tensor) -> Tensor:
    """Mask that is added to attention scores, `(1, 1, T, T)`, of `(B, T, width)` states: `eager` attention needs it."""
    length = hidden.shape[1]
    future = torch.full((length, length), torch.finfo(hidden.dtype).min, dtype=hidden.dtype, device=hidden.device)
    return future.triu(diagonal=1)[None, None]


def length_mask(positions: Tensor, num_attended: int, dtype: torch.dtype) -> Tensor:
    """Mask that is added to attention scores, `(N, 1, 1, num_attended)`: a row's token sees up to its own position.

    It is not boolean, because torch would turn it into this one in each block.
    """
    is_behind = torch.arange(num_attended, device=positions.device) > positions[:, None]
    mask = torch.zeros(is_behind.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill_(is_behind, float("-inf"))[:, None, None]
