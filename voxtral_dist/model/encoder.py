"""The encoder in chunks of some windows at a time, so that its memory does not grow with the length of clips.

Where there are several chunks, each is checkpointed: its activations are dropped and recomputed in the backward pass.
Only the input and the audio tokens of a window are kept, a small part of what the encoder needs to compute them
(`benchmarks/encoder_memory.py`).

Engines that shard weights gather them for every chunk, so all ranks must run equally many chunks. A rank with fewer
windows than chunks adds chunks of one silent window with weight zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import VoxtralForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling


def num_chunks(num_windows: int, windows_per_chunk: int) -> int:
    """The number of chunks that this many windows need; at least 1."""
    return max(1, -(-num_windows // windows_per_chunk))


@dataclass
class _HeldExamples:
    """Features `(C, M, F)` of some examples, and the embeddings of each after the first forward pass."""

    features: Tensor
    windows_per_example: tuple[int, ...]
    embedded: tuple[Tensor, ...] = ()


class ChunkedEncoder:
    """A replacement for a Voxtral's `get_audio_features`, which maps mel features to embeddings of audio tokens.

    num_chunks: chunks of the next forward pass; None for as many as its windows need, as on a rank that decodes alone.
    windows_per_chunk: maximum windows of a chunk.
    """

    def __init__(self, model: VoxtralForConditionalGeneration, windows_per_chunk: int) -> None:
        """Replace the method of a model, in place."""
        self.num_chunks: int | None = None
        self.windows_per_chunk = windows_per_chunk
        self._held: _HeldExamples | None = None
        self._whole: Callable[..., BaseModelOutputWithPooling] = model.model.get_audio_features
        # On the instance, which shadows the class; saved models are not affected.
        model.model.get_audio_features = self

    @classmethod
    def of(cls, model: nn.Module) -> ChunkedEncoder:
        """The chunked encoder that was put into a model."""
        encoder = model.get_submodule("model").get_audio_features
        assert isinstance(encoder, ChunkedEncoder), "every model that is trained or decoded has one"
        return encoder

    @contextmanager
    def holding(self, features: Tensor, windows_per_example: Sequence[int]) -> Iterator[Tensor]:
        """Context in which forward passes without gradients take numbers of examples in place of features.

        Each example is encoded once, for both its loss and its transcript. A beam search repeats rows of its inputs; of
        features it would repeat single windows, in a wrong order for clips of several windows.

        Args:
            features: `(C, M, F)` of all windows of some examples, in order.
            windows_per_example: windows of each of B examples, C in all.

        Yields:
            Numbers of the examples, int64 `(B)`. The model takes them as `input_features`, in any order and repeated.
        """
        assert not torch.is_grad_enabled(), "embeddings are used several times, and their graph could be only once"
        self._held = _HeldExamples(features, tuple(windows_per_example))
        try:
            yield torch.arange(len(windows_per_example), device=features.device)
        finally:
            self._held = None

    def __call__(self, input_features: Tensor, **arguments: Any) -> BaseModelOutputWithPooling:
        """Embeddings of audio tokens, `(C * tokens of a window, width)`, of `(C, M, F)` features.

        Inside `holding`, `input_features` are numbers of examples.
        """
        if self._held is None:
            return BaseModelOutputWithPooling(pooler_output=self._in_chunks(input_features))
        if not self._held.embedded:
            embedded = self._in_chunks(self._held.features)
            tokens_per_window = len(embedded) // len(self._held.features)
            sizes = [tokens_per_window * count for count in self._held.windows_per_example]
            self._held.embedded = torch.split(embedded, sizes)
        chosen = [self._held.embedded[number] for number in input_features.tolist()]
        return BaseModelOutputWithPooling(pooler_output=torch.cat(chosen))

    def _in_chunks(self, input_features: Tensor) -> Tensor:
        count = self.num_chunks or num_chunks(len(input_features), self.windows_per_chunk)
        if count == 1:
            return self._embed(input_features)
        parts = [part for part in input_features.tensor_split(count) if len(part)]
        embedded = [self._checkpointed(part) for part in parts]
        silent = torch.zeros_like(input_features[:1])
        weightless = [self._checkpointed(silent).sum() * 0.0 for _ in range(count - len(parts))]
        return sum(weightless, torch.cat(embedded))

    def _checkpointed(self, features: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self._embed(features)
        embedded: Tensor = checkpoint(self._embed, features, use_reentrant=False)
        return embedded

    def _embed(self, features: Tensor) -> Tensor:
        embedded: Tensor = self._whole(features, return_dict=True).pooler_output
        return embedded
