"""Transformer blocks, and what is wrapped around their forward methods: compilation, kernels, checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import VoxtralForConditionalGeneration

from voxtral_dist.config import Component, ModelConfig
from voxtral_dist.model.activation_offloading import ActivationOffloading
from voxtral_dist.model.attention import without_cudnn
from voxtral_dist.model.mlp_chunks import MlpChunks

# Dimensions of hidden states.
_EXAMPLES, _POSITIONS = 0, 1
# Graphs of all blocks together: by kind of block, with and without a gradient before it, with one example and several.
# torch stops at 8, with an error where a block must be one graph.
_MAX_GRAPHS = 64


def blocks_of(model: VoxtralForConditionalGeneration) -> dict[Component, list[nn.Module]]:
    """The transformer blocks of each component in order: the units of sharding, checkpointing and compilation."""
    return {
        "encoder": list(model.model.audio_tower.layers),
        "projector": [],
        "language_model": list(model.model.language_model.layers),
    }


def wrap_blocks(
    model: VoxtralForConditionalGeneration, config: ModelConfig, mlp_chunks: MlpChunks | None = None
) -> None:
    """Wrap the forward methods of blocks in compilation, chunks and checkpointing, inside the hooks of engines.

    `compile_blocks: auto` compiles nothing: an engine is built with what was chosen for it.
    """
    is_compiled = config.compile_blocks is True
    if is_compiled:
        torch._dynamo.config.recompile_limit = max(_MAX_GRAPHS, torch._dynamo.config.recompile_limit)
        if config.float8 is not None:
            # Else values that the compiler computes again for the backward pass are rounded otherwise than before, and
            # attention gives NaN gradients (pytorch/pytorch#150859).
            torch._inductor.config.emulate_precision_casts = True
    for block in blocks_of(model)["encoder"]:
        if is_compiled:
            block.forward = _compiled(block.forward, block, _EXAMPLES)
    for block in blocks_of(model)["language_model"]:
        if mlp_chunks is not None:
            block.forward = _in_mlp_chunks(block.forward, block, mlp_chunks, is_compiled)
        elif is_compiled:
            block.forward = _compiled(block.forward, block, _EXAMPLES, _POSITIONS)
        if not config.cudnn_attention:
            block.forward = _without_cudnn(block.forward)
    checkpointing = config.checkpointing
    _checkpoint_blocks(blocks_of(model)["encoder"], checkpointing.encoder)
    offloading = ActivationOffloading() if config.activation_offloading else None
    _checkpoint_blocks(blocks_of(model)["language_model"], checkpointing.language_model, offloading)


def _checkpoint_blocks(blocks: list[nn.Module], every: int, offloading: ActivationOffloading | None = None) -> None:
    for number, block in enumerate(blocks):
        if is_checkpointed(number, every):
            block.forward = _checkpointed(block.forward, block, offloading.saving if offloading else nullcontext)


def _compiled(forward: Callable[..., Any], block: nn.Module, *dynamic: int) -> Callable[..., Any]:
    """Compile training only, as one graph for any size of the dynamic dimensions of hidden states `(B, T, width)`.

    In decoding, lengths change with every token, and kernels are small.
    """
    compiled = torch.compile(forward, fullgraph=True)

    def maybe_compiled(hidden: Tensor, *arguments: Any, **named: Any) -> Any:
        if not block.training:
            return forward(hidden, *arguments, **named)
        _mark_dynamic(hidden, named, dynamic)
        return compiled(hidden, *arguments, **named)

    return maybe_compiled


def _mark_dynamic(hidden: Tensor, named: dict[str, Any], dynamic: tuple[int, ...]) -> None:
    """Tell the compiler which sizes change, before it has seen them change: else it compiles for the first one alone.

    A size of 1 makes a graph of its own.
    """
    torch._dynamo.maybe_mark_dynamic(hidden, list(dynamic))
    if _POSITIONS in dynamic:
        for angles in named.get("position_embeddings", ()):
            torch._dynamo.maybe_mark_dynamic(angles, _POSITIONS)
        mask = named.get("attention_mask")
        if mask is not None:
            torch._dynamo.maybe_mark_dynamic(mask, [2, 3])


def _in_mlp_chunks(
    forward: Callable[..., Any], block: nn.Module, mlp_chunks: MlpChunks, compiles: bool
) -> Callable[..., Any]:
    """Compute the MLP in chunks in training; a compiler would see another graph for each number of chunks."""
    halves = (_attention_half, _mlp_half)
    attention, mlp = (torch.compile(half, fullgraph=True) if compiles else half for half in halves)

    def mlp_of_chunk(flat: Tensor) -> Tensor:
        if compiles:
            _mark_dynamic(flat, {}, (_EXAMPLES,))
        return mlp(block, flat)

    def in_chunks(hidden: Tensor, **named: Any) -> Any:
        if block.training and torch.is_grad_enabled():
            if compiles:
                _mark_dynamic(hidden, named, (_EXAMPLES, _POSITIONS))
            return mlp_chunks(mlp_of_chunk, attention(block, hidden, **named))
        return forward(hidden, **named)

    return in_chunks


def _attention_half(block: Any, hidden: Tensor, **named: Any) -> Tensor:
    """The first half of transformers' `LlamaDecoderLayer.forward`."""
    attended: Tensor = block.self_attn(block.input_layernorm(hidden), **named)[0]
    return hidden + attended


def _mlp_half(block: Any, hidden: Tensor) -> Tensor:
    """The second half."""
    moved: Tensor = block.mlp(block.post_attention_layernorm(hidden))
    return hidden + moved


def _without_cudnn(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a forward method; a checkpoint that recomputes it in the backward pass recomputes it wrapped."""

    def guarded(*inputs: Any, **named: Any) -> Any:
        with without_cudnn():
            return forward(*inputs, **named)

    return guarded


def is_checkpointed(block_number: int, every: int) -> bool:
    """Whether a block is checkpointed where every n-th one is; with `every` 0 none is."""
    return every > 0 and block_number % every == 0


def _checkpointed(
    forward: Callable[..., Any], block: nn.Module, saving: Callable[[], AbstractContextManager[Any]]
) -> Callable[..., Any]:
    def checkpointed(*inputs: Any, **named: Any) -> Any:
        if block.training and torch.is_grad_enabled():
            with saving():
                return checkpoint(forward, *inputs, use_reentrant=False, **named)
        return forward(*inputs, **named)

    return checkpointed
