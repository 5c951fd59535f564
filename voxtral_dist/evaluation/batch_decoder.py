"""Transcripts by generation: batched, and the same for an utterance whatever it is batched with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from voxtral_dist.config import EvaluationConfig
from voxtral_dist.data.examples.example import Example
from voxtral_dist.data.examples.micro_batch import collate, pad_left, silent_example
from voxtral_dist.engine.loss import LossOfMicroBatch
from voxtral_dist.model.encoder import ChunkedEncoder, num_chunks
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.prompts import VoxtralPrompts

# Even the shortest clip may have this many tokens.
MIN_NEW_TOKENS = 16
# Targets whose logits are computed at a time.
_LOSS_CHUNK_TOKENS = 2048


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


@dataclass(frozen=True)
class DecodedBatch:
    """Hypotheses of a batch, and the summed cross entropy of its targets; no targets where it was not asked for."""

    hypotheses: list[Hypothesis]
    loss_sum: float = 0.0
    num_target_tokens: int = 0


class BatchDecoder:
    """A model with its tokenizer and features, decoding batches of examples.

    in_lockstep: the model is sharded over ranks, which all decode at the same time, batch by batch. A rank whose batch
    is finished goes on with empty steps for as long as others need it. silence: what a rank without a batch decodes.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: VoxtralPrompts,
        log_mel: LogMel,
        settings: EvaluationConfig,
        in_lockstep: bool = False,
    ) -> None:
        """Decode by a `TrainedVoxtral` in evaluation mode that has `ChunkedEncoder`."""
        self.in_lockstep = in_lockstep
        self._model = model
        self._passes = ChunkedEncoder.of(model)
        self._prompts = prompts
        self._log_mel = log_mel
        self.silence = silent_example(prompts)
        self._loss = LossOfMicroBatch(log_mel, _LOSS_CHUNK_TOKENS)
        self._settings = settings

    def __call__(self, examples: Sequence[Example]) -> list[Hypothesis]:
        """One hypothesis for each example, in their order, on a rank by itself."""
        return self.decode(examples, with_loss=False).hypotheses

    @torch.no_grad()
    def decode(self, examples: Sequence[Example], *, with_loss: bool, most_windows: int | None = None) -> DecodedBatch:
        """Hypotheses of examples in their order, and the loss of their targets.

        Args:
            examples: at least one.
            with_loss: measure it too: another pass of the language model, none of the encoder.
            most_windows: on the rank that has the most of them, for decoding in lockstep.
        """
        batch = collate(examples, self._prompts.pad_id, self._prompts.window_samples).to(self._device)
        features = self._log_mel(batch.pcm, batch.windows_per_example)
        self._passes.num_chunks = most_windows and num_chunks(most_windows, self._passes.windows_per_chunk)
        with self._passes.holding(features, batch.windows_per_example) as numbers:
            # The loss comes first on all ranks, so that all of them encode in the same pass.
            loss_sum = float(self._loss(self._model, batch, numbers)) if with_loss else 0.0
            hypotheses = self._generate(examples, numbers)
        return DecodedBatch(hypotheses, loss_sum, batch.num_target_tokens if with_loss else 0)

    def _generate(self, examples: Sequence[Example], numbers: Tensor) -> list[Hypothesis]:
        prompts, attention_mask = pad_left([example.prompt for example in examples], self._prompts.pad_id)
        limits = [self._limit(example) for example in examples]
        # transformers would keep the room of the longest batch so far for every later one, however many rows it has.
        self._model._previous_max_cache_length = -1  # type: ignore[assignment]
        generated: Tensor = self._model.generate(  # type: ignore[operator]
            input_ids=prompts.to(self._device),
            attention_mask=attention_mask.to(self._device),
            input_features=numbers,
            max_new_tokens=max(limits),
            stopping_criteria=StoppingCriteriaList([_OwnLimits(limits, prompts.shape[1], self._device)]),
            synced_gpus=self.in_lockstep,
            pad_token_id=self._prompts.pad_id,
            eos_token_id=self._prompts.eos_id,
            **_search(self._settings, self.in_lockstep),
        )
        completions = generated[:, prompts.shape[1] :].tolist()
        return [
            self._hypothesis(example, ids, limit)
            for example, ids, limit in zip(examples, completions, limits, strict=True)
        ]

    @property
    def _device(self) -> torch.device:
        return self._log_mel.device

    def _limit(self, example: Example) -> int:
        by_length = MIN_NEW_TOKENS + math.ceil(self._settings.max_tokens_per_second * example.duration_seconds)
        # The model has no positions for more.
        return min(by_length, self._prompts.max_positions - len(example.prompt))

    def _hypothesis(self, example: Example, ids: list[int], limit: int) -> Hypothesis:
        own = ids[:limit]
        hit_limit = self._prompts.eos_id not in own
        if not hit_limit:
            own = own[: own.index(self._prompts.eos_id)]
        if not example.is_transcription:
            return Hypothesis(self._prompts.decode(own).strip(), None, len(own), hit_limit)
        transcript = self._prompts.transcript(own)
        return Hypothesis(transcript.text, transcript.language, len(own), hit_limit)


def _search(settings: EvaluationConfig, in_lockstep: bool) -> dict[str, Any]:
    """How `generate` chooses tokens, whatever a checkpoint's own file of defaults says."""
    # Empty steps of a rank that has finished would run over the end of a static cache.
    cache = {"cache_implementation": "static"} if settings.static_cache and not in_lockstep else {}
    # Stopping at the best score that is still possible depends on no other utterance of the batch.
    beams = {"length_penalty": 1.0, "early_stopping": False} if settings.num_beams > 1 else {}
    return {"do_sample": False, "num_beams": settings.num_beams, "use_cache": True, **beams, **cache}


class _OwnLimits(StoppingCriteria):  # type: ignore[misc]  # of a package without types
    """Ends each utterance at its own limit of tokens: its neighbours, whose limits may be larger, do not matter."""

    def __init__(self, limits: Sequence[int], num_prompt_tokens: int, device: torch.device) -> None:
        self._limits = torch.tensor(limits, device=device)
        self._num_prompt_tokens = num_prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Whether each row is at its limit; an utterance has as many rows as beams are looked at."""
        rows_per_example = len(input_ids) // len(self._limits)
        is_at_limit: Tensor = self._limits <= input_ids.shape[1] - self._num_prompt_tokens
        return is_at_limit.repeat_interleave(rows_per_example)
