"""Transcripts by greedy generation: batched, and the same for an utterance whatever it is batched with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from voxtral_dist.data.batches import pad_left, windows_of
from voxtral_dist.data.features import LogMel
from voxtral_dist.data.prompts import VoxtralPrompts
from voxtral_dist.data.samples import Example

# Even the shortest clip may have this many tokens.
MIN_NEW_TOKENS = 16


@dataclass(frozen=True)
class Hypothesis:
    """A decoded transcript or answer.

    detected_language: that the model named before a transcript; never part of the text. hit_limit: whether it was ended
    by the limit of tokens, and not by the model.
    """

    text: str
    detected_language: str | None
    num_tokens: int
    hit_limit: bool


class Transcriber:
    """A whole model with its tokenizer and features, decoding batches of examples."""

    def __init__(
        self, model: nn.Module, prompts: VoxtralPrompts, log_mel: LogMel, max_tokens_per_second: float
    ) -> None:
        self._model = model
        self._prompts = prompts
        self._log_mel = log_mel
        self._max_tokens_per_second = max_tokens_per_second

    @torch.no_grad()
    def __call__(self, examples: Sequence[Example]) -> list[Hypothesis]:
        """One hypothesis for each example, in their order."""
        device = next(self._model.parameters()).device
        input_ids, attention_mask = pad_left([example.prompt for example in examples], self._prompts.pad_id)
        pcm = windows_of(examples, self._prompts.window_samples).to(device)
        limits = [self._limit(example) for example in examples]
        generated: Tensor = self._model.generate(  # type: ignore[operator]
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            input_features=self._log_mel(pcm, [example.num_windows for example in examples]),
            max_new_tokens=max(limits),
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=self._prompts.pad_id,
            eos_token_id=self._prompts.eos_id,
        )
        completions = generated[:, input_ids.shape[1] :].tolist()
        return [
            self._hypothesis(example, ids, limit)
            for example, ids, limit in zip(examples, completions, limits, strict=True)
        ]

    def _limit(self, example: Example) -> int:
        by_length = MIN_NEW_TOKENS + math.ceil(self._max_tokens_per_second * example.duration_seconds)
        # The model has no positions for more.
        return min(by_length, self._prompts.max_positions - len(example.prompt))

    def _hypothesis(self, example: Example, ids: list[int], limit: int) -> Hypothesis:
        # The batch runs to its largest limit: each utterance is cut at its own, so that its neighbours do not matter.
        own = ids[:limit]
        hit_limit = self._prompts.eos_id not in own
        if not hit_limit:
            own = own[: own.index(self._prompts.eos_id)]
        if not example.is_transcription:
            return Hypothesis(self._prompts.decode(own).strip(), None, len(own), hit_limit)
        transcript = self._prompts.transcript(own)
        return Hypothesis(transcript.text, transcript.language, len(own), hit_limit)
