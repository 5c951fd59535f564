"""Transformer blocks, and what is wrapped around their forward methods: compilation, kernels, checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import VoxtralForConditionalGeneration

from voxtral_dist.config import Component, ModelConfig
from voxtral_dist.model.attention import without_cudnn


def blocks_of(model: VoxtralForConditionalGeneration) -> dict[Component, list[nn.Module]]:
    """The transformer blocks of each component in order: the units of sharding, checkpointing and compilation."""
    return {
        "encoder": list(model.model.audio_tower.layers),
        "projector": [],
        "language_model": list(model.model.language_model.layers),
    }


def wrap_blocks(model: VoxtralForConditionalGeneration, config: ModelConfig) -> None:
    """Wrap the forward methods of blocks in compilation and checkpointing, inside the hooks of engines."""
    every = {
        "encoder": config.activation_checkpointing.encoder,
        "language_model": config.activation_checkpointing.language_model,
    }
    for component, blocks in blocks_of(model).items():
        for number, block in enumerate(blocks):
            if config.compile_blocks:
                block.forward = _compiled(block.forward, block)
            if component == "language_model" and not config.cudnn_attention:
                block.forward = _without_cudnn(block.forward)
            if is_checkpointed(number, every[component]):
                block.forward = _checkpointed(block.forward, block)


def _compiled(forward: Callable[..., Any], block: nn.Module) -> Callable[..., Any]:
    """Compile training only: in decoding, lengths change with every token, and torch would recompile each time."""
    compiled = torch.compile(forward)

    def maybe_compiled(*arguments: Any, **named: Any) -> Any:
        return (compiled if block.training else forward)(*arguments, **named)

    return maybe_compiled


def _without_cudnn(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a forward method; a checkpoint that recomputes it in the backward pass recomputes it wrapped."""

    def guarded(*inputs: Any, **named: Any) -> Any:
        with without_cudnn():
            return forward(*inputs, **named)

    return guarded


def is_checkpointed(block_number: int, every: int) -> bool:
    """Whether a block is checkpointed where every n-th one is; with `every` 0 none is."""
    return every > 0 and block_number % every == 0


def _checkpointed(forward: Callable[..., Any], block: nn.Module) -> Callable[..., Any]:
    def checkpointed(*inputs: Any, **named: Any) -> Any:
        if block.training and torch.is_grad_enabled():
            return checkpoint(forward, *inputs, use_reentrant=False, **named)
        return forward(*inputs, **named)

    return checkpointed
