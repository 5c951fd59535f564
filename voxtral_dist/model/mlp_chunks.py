"""MLPs of the language model in chunks of some positions at a time (tiled MLPs: Bekman et al., arXiv 2506.13996).

An MLP looks at each position by itself. Its intermediate values are what a block needs most memory for; those of a
chunk are dropped in the forward pass, and computed again in the backward pass just before they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from voxtral_dist.model.encoder import num_chunks


class MlpChunks:
    """The number of chunks in which blocks compute their MLPs.

    chunk_tokens: maximum positions of a chunk. num_chunks: of the next forward pass; None for as many as its positions
    need. Engines that gather each layer need the same number on all ranks.
    """

    def __init__(self, chunk_tokens: int) -> None:
        self.chunk_tokens = chunk_tokens
        self.num_chunks: int | None = None

    def __call__(self, function: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
        """The results of a function of single positions for `(B, T, width)` states, in their shape."""
        flat = states.flatten(0, 1)
        parts = flat.tensor_split(self.num_chunks or num_chunks(len(flat), self.chunk_tokens))
        # A checkpoint of the block stops to recompute once it has all that was kept. Everything is kept here before
        # the first chunk is computed, so it computes no chunk.
        chunks = [_Chunk(function, part) for part in parts]
        return torch.cat([chunk.computed() for chunk in chunks]).view_as(states)


class _Chunk:
    """A checkpoint of one chunk, whose input is kept before, and not while, it is computed."""

    def __init__(self, function: Callable[[Tensor], Tensor], part: Tensor) -> None:
        self._function = function
        self._input: Tensor | None = _Kept.apply(part)  # type: ignore[no-untyped-call]
        # None where nothing before this MLP is trained: then the input itself stays.
        self._kept: Any = self._input.grad_fn
        # Tells the checkpoint whose random state it has to restore. It would keep a tensor that is no part of a tuple.
        self._device = (torch.empty(0, device=part.device),)

    def computed(self) -> Tensor:
        """The output, whose backward pass computes it again."""
        made: Tensor = checkpoint(self._compute, self._device, use_reentrant=False)
        return made

    def _compute(self, _: tuple[Tensor]) -> Tensor:
        given = self._kept.saved_tensors[0] if self._input is None else self._input
        if self._kept is not None:
            self._input = None
        return self._function(given)


class _Kept(torch.autograd.Function):
    """The identity, which keeps its input for whoever asks its node in the graph."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]
