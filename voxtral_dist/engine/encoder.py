"""The encoder in passes over some windows at a time: its memory does not grow with the length of clips.

A pass is checkpointed where there are several: its activations are dropped, and computed again in the backward pass.
What stays of a window is its input and its audio tokens, a small part of what the encoder needs to compute them
(`benchmarks/encoder_memory.py`).

Engines that shard weights gather them in every pass, so all ranks must make equally many. A rank with fewer windows
than passes fills up with passes over one silent window of weight zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import VoxtralForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling


def num_passes(num_windows: int, windows_per_pass: int) -> int:
    """Passes that this many windows take."""
    return max(1, -(-num_windows // windows_per_pass))


class EncoderPasses:
    """Takes the place of a Voxtral's `get_audio_features`, which maps mel features to the embeddings of audio tokens.

    num_passes: of the next forward pass; None makes as many as its windows need, as on a rank that decodes alone.
    """

    def __init__(self, model: VoxtralForConditionalGeneration, windows_per_pass: int) -> None:
        """Put passes of at most so many windows into a model."""
        self.num_passes: int | None = None
        self._windows_per_pass = windows_per_pass
        self._whole: Callable[..., BaseModelOutputWithPooling] = model.model.get_audio_features
        # On the instance, where the forward pass looks first; the class and saved models know nothing of it.
        model.model.get_audio_features = self

    def __call__(self, input_features: Tensor, **arguments: Any) -> BaseModelOutputWithPooling:
        """Embeddings of the audio tokens of `(C, M, F)` features, `(C * tokens of a window, width)`."""
        count = self.num_passes or num_passes(len(input_features), self._windows_per_pass)
        if count == 1:
            return BaseModelOutputWithPooling(pooler_output=self._embed(input_features))
        parts = [part for part in input_features.tensor_split(count) if len(part)]
        embedded = [self._checkpointed(part) for part in parts]
        silent = torch.zeros_like(input_features[:1])
        weightless = [self._checkpointed(silent).sum() * 0.0 for _ in range(count - len(parts))]
        return BaseModelOutputWithPooling(pooler_output=sum(weightless, torch.cat(embedded)))

    def _checkpointed(self, features: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self._embed(features)
        embedded: Tensor = checkpoint(self._embed, features, use_reentrant=False)
        return embedded

    def _embed(self, features: Tensor) -> Tensor:
        embedded: Tensor = self._whole(features, return_dict=True).pooler_output
        return embedded
