"""The encoder in passes over some windows at a time: its memory does not grow with the length of clips.

A pass is checkpointed where there are several: its activations are dropped, and computed again in the backward pass.
What stays of a window is its input and its audio tokens, a small part of what the encoder needs to compute them
(`benchmarks/encoder_memory.py`).

Engines that shard weights gather them in every pass, so all ranks must make equally many. A rank with fewer windows
than passes fills up with passes over one silent window of weight zero.
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
    """Passes that this many windows take."""
    return max(1, -(-num_windows // windows_per_chunk))


@dataclass
class _HeldExamples:
    """Features `(C, M, F)` of some examples, and what the encoder made of each, once it was asked."""

    features: Tensor
    windows_per_example: tuple[int, ...]
    embedded: tuple[Tensor, ...] = ()


class ChunkedEncoder:
    """Takes the place of a Voxtral's `get_audio_features`, which maps mel features to the embeddings of audio tokens.

    num_chunks: of the next forward pass; None makes as many as its windows need, as on a rank that decodes alone.
    windows_per_chunk: at most so many windows are taken at a time.
    """

    def __init__(self, model: VoxtralForConditionalGeneration, windows_per_chunk: int) -> None:
        """Put passes of at most so many windows into a model."""
        self.num_chunks: int | None = None
        self.windows_per_chunk = windows_per_chunk
        self._held: _HeldExamples | None = None
        self._whole: Callable[..., BaseModelOutputWithPooling] = model.model.get_audio_features
        # On the instance, where the forward pass looks first; the class and saved models know nothing of it.
        model.model.get_audio_features = self

    @classmethod
    def of(cls, model: nn.Module) -> ChunkedEncoder:
        """The passes that were put into a model."""
        passes = model.get_submodule("model").get_audio_features
        assert isinstance(passes, ChunkedEncoder), "every model that is trained or decoded has them"
        return passes

    @contextmanager
    def holding(self, features: Tensor, windows_per_example: Sequence[int]) -> Iterator[Tensor]:
        """Inside, forward passes without gradients name examples by their numbers, in place of features.

        Each example is encoded once, for its loss and its transcript alike. A beam search repeats rows, and would
        repeat the windows of a clip one by one, in a wrong order where it has several.

        Args:
            features: `(C, M, F)` of all windows of some examples, in order.
            windows_per_example: of each of B examples; C in all.

        Yields:
            The numbers, int64 `(B)`: what the model takes for `input_features`, repeated and chosen in any order.
        """
        assert not torch.is_grad_enabled(), "a graph can be gone through once"
        self._held = _HeldExamples(features, tuple(windows_per_example))
        try:
            yield torch.arange(len(windows_per_example), device=features.device)
        finally:
            self._held = None

    def __call__(self, input_features: Tensor, **arguments: Any) -> BaseModelOutputWithPooling:
        """Embeddings of the audio tokens of `(C, M, F)` features, `(C * tokens of a window, width)`.

        Inside of `holding`, of examples by their numbers.
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
