"""Transcripts by batched generation; the other utterances of a batch do not change a hypothesis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from voxtral_dist.checkpoints.loading import config_of_checkpoint, is_checkpoint, load_checkpoint, refuse_ema
from voxtral_dist.checkpoints.verifying import damage_over_ranks
from voxtral_dist.config import MIN_NEW_TOKENS, EvaluationConfig, ModelConfig
from voxtral_dist.data.examples.example import Example
from voxtral_dist.data.examples.micro_batch import collate, pad_left, silent_example
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.loss import LossOfMicroBatch
from voxtral_dist.errors import UserError
from voxtral_dist.model.attention import masked_attention
from voxtral_dist.model.encoder import ChunkedEncoder, num_chunks
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.model.weights import load_for_inference

# Target tokens whose logits are computed at a time.
LOSS_CHUNK_TOKENS = 2048
_WINDOWS_PER_CHUNK: int = ModelConfig.model_fields["encoder_windows_per_chunk"].default


@dataclass(frozen=True)
class Hypothesis:
    """A decoded transcript or answer.

    Attributes:
        detected_language: named by the model before a transcript; never part of the text.
        hit_limit: whether the token limit ended it, not the model.
    """

    text: str
    detected_language: str | None
    num_tokens: int
    hit_limit: bool


@dataclass(frozen=True)
class DecodedBatch:
    """Hypotheses of a batch, and the summed cross entropy of its target tokens; 0 tokens where it was not measured."""

    hypotheses: list[Hypothesis]
    loss_sum: float = 0.0
    num_target_tokens: int = 0


class BatchDecoder:
    """A model with its tokenizer and features, which decodes batches of examples.

    Attributes:
        in_lockstep: whether the model is sharded, so that all ranks must decode at the same time, batch by batch. A
            rank whose batch has ended runs empty steps until the batches of all ranks have.
        silence: the example that a rank without a batch decodes in lockstep.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: VoxtralPrompts,
        log_mel: LogMel,
        settings: EvaluationConfig,
        in_lockstep: bool = False,
    ) -> None:
        """Wrap a `TrainedVoxtral` in evaluation mode whose encoder is a `ChunkedEncoder`."""
        self.in_lockstep = in_lockstep
        self._model = model
        self._encoder = ChunkedEncoder.of(model)
        self._prompts = prompts
        self._log_mel = log_mel
        self.silence = silent_example(prompts)
        self._loss = LossOfMicroBatch(log_mel, LOSS_CHUNK_TOKENS)
        self._settings = settings

    def __call__(self, examples: Sequence[Example]) -> list[Hypothesis]:
        """Decode examples on this rank alone: one hypothesis per example, in the same order."""
        return self.decode(examples, with_loss=False).hypotheses

    @torch.no_grad()
    def decode(self, examples: Sequence[Example], *, with_loss: bool, most_windows: int | None = None) -> DecodedBatch:
        """Decode examples, and measure the loss of their targets.

        Args:
            examples: at least one.
            with_loss: measure the loss: one more forward pass of the language model, none of the encoder.
            most_windows: windows of the batch, maximum over ranks; needed in lockstep.

        Returns:
            Hypotheses in the order of the examples, and the loss.
        """
        batch = collate(examples, self._prompts).to(self._device)
        features = self._log_mel(batch.pcm, batch.windows_per_example)
        self._encoder.num_chunks = most_windows and num_chunks(most_windows, self._encoder.windows_per_chunk)
        with self._encoder.holding(features, batch.windows_per_example) as numbers:
            # The loss comes first, so that all ranks encode in the same forward pass.
            loss_sum = float(self._loss(self._model, batch, numbers)) if with_loss else 0.0
            hypotheses = self._generate(examples, numbers)
        return DecodedBatch(hypotheses, loss_sum, batch.num_target_tokens if with_loss else 0)

    def _generate(self, examples: Sequence[Example], numbers: Tensor) -> list[Hypothesis]:
        prompts, attention_mask = pad_left([example.prompt for example in examples], self._prompts.pad_id)
        limits = [self._limit(example) for example in examples]
        # transformers takes this if its own length is less; what it leaves here would lengthen every later cache.
        self._model._previous_max_cache_length = cache_length(prompts.shape[1] + max(limits))  # type: ignore[assignment]
        with masked_attention(self._model):
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


def cache_length(num_positions: int) -> int:
    """Positions of a static cache that holds this many: the next power of two, or three halves of one.

    On a GPU, transformers compiles the model and records a graph for each length: at most two in an octave.
    """
    power: int = 1 << (num_positions - 1).bit_length()
    return power * 3 // 4 if num_positions <= power * 3 // 4 else power


def load_decoder(
    model_path: str, prompts: VoxtralPrompts, settings: EvaluationConfig, precision: str, world: World
) -> BatchDecoder:
    """Load a whole model onto this rank's device for decoding; all ranks call it together.

    Args:
        model_path: a folder with a Hugging Face model, a name on the hub, or a checkpoint of a run.
        prompts: of the model; see `load_prompts`.
        settings: of decoding.
        precision: of the weights.
        world: of this rank.

    Raises:
        UserError: the path is no Voxtral model, or a damaged checkpoint.
    """
    if is_checkpoint(model_path):
        damage = damage_over_ranks(Path(model_path), world)
        if damage is not None:
            raise UserError(damage)
        model = load_checkpoint(model_path, world.device, precision, settings.ema)
    else:
        refuse_ema(model_path, settings.ema)
        model = load_for_inference(model_path, world.device, precision)
    ChunkedEncoder(model, _WINDOWS_PER_CHUNK)
    log_mel = LogMel.from_pretrained(_processor_path(model_path), world.device)
    return BatchDecoder(model, prompts, log_mel, settings)


def load_prompts(model_path: str) -> VoxtralPrompts:
    """The prompts of a model, or of the run that wrote a checkpoint.

    Raises:
        UserError: the path is neither.
    """
    if is_checkpoint(model_path):
        model = config_of_checkpoint(Path(model_path)).model
        return VoxtralPrompts.from_pretrained(model.path, model.max_positions)
    return VoxtralPrompts.from_pretrained(model_path)


def _processor_path(model_path: str) -> str:
    """Where a model's feature extractor is: for a checkpoint, the model that its run started from."""
    return config_of_checkpoint(Path(model_path)).model.path if is_checkpoint(model_path) else model_path


def _search(settings: EvaluationConfig, in_lockstep: bool) -> dict[str, Any]:
    """Arguments of `generate` that choose tokens; they override a checkpoint's `generation_config.json`."""
    # In lockstep, empty steps of a finished rank would run past the end of a static cache.
    cache = {"cache_implementation": "static"} if settings.static_cache and not in_lockstep else {}
    # Without early stopping, a beam search ends when no open beam can win, whatever else is in the batch.
    beams = {"length_penalty": 1.0, "early_stopping": False} if settings.num_beams > 1 else {}
    return {"do_sample": False, "num_beams": settings.num_beams, "use_cache": True, **beams, **cache}


class _OwnLimits(StoppingCriteria):  # type: ignore[misc]  # of a package without types
    """Ends each utterance at its own token limit, although others of the batch may have larger ones."""

    def __init__(self, limits: Sequence[int], num_prompt_tokens: int, device: torch.device) -> None:
        self._limits = torch.tensor(limits, device=device)
        self._num_prompt_tokens = num_prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Whether each row has reached its limit; an utterance has one row per beam."""
        rows_per_example = len(input_ids) // len(self._limits)
        is_at_limit: Tensor = self._limits <= input_ids.shape[1] - self._num_prompt_tokens
        return is_at_limit.repeat_interleave(rows_per_example)
