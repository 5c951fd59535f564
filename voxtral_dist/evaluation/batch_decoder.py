"""Transcripts of examples; what is decoded at the same time does not change a hypothesis.

Greedy decoding takes examples in and out of a running batch (`ContinuousDecoder`). Beam searches, and ranks in
lockstep, decode batch by batch with transformers' `generate`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from voxtral_dist.checkpoints.loading import config_of_checkpoint, is_checkpoint, load_checkpoint, refuse_ema
from voxtral_dist.checkpoints.verifying import damage_over_ranks
from voxtral_dist.config import MIN_NEW_TOKENS, EvaluationConfig, ModelConfig
from voxtral_dist.data.examples.example import Example
from voxtral_dist.data.examples.micro_batch import collate, pad_left, silent_example
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.loss import LossOfMicroBatch
from voxtral_dist.errors import UserError
from voxtral_dist.evaluation.continuous_decoder import LOSS_CHUNK_TOKENS, ContinuousDecoder, rounded_size
from voxtral_dist.model.attention import masked_attention
from voxtral_dist.model.encoder import ChunkedEncoder, num_chunks
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.model.voxtral import TrainedVoxtral
from voxtral_dist.model.weights import load_for_inference

# A quarter of the rows is refilled at a time: smaller groups make the encoder's batches small, larger ones leave rows
# empty for longer.
GROUPS_PER_BATCH = 4
Item = TypeVar("Item")
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
class DecodedExamples:
    """Examples with their hypotheses, and the summed cross entropy of target tokens; 0 tokens where not measured."""

    pairs: list[tuple[Example, Hypothesis]]
    loss_sum: float = 0.0
    num_target_tokens: int = 0

    @property
    def hypotheses(self) -> list[Hypothesis]:
        """The hypotheses in the order of the examples."""
        return [hypothesis for _, hypothesis in self.pairs]


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
        assert isinstance(model, TrainedVoxtral), "engines and `load_for_inference` have no other"
        self.in_lockstep = in_lockstep
        self._model = model
        self._encoder = ChunkedEncoder.of(model)
        self._prompts = prompts
        self._log_mel = log_mel
        self.silence = silent_example(prompts)
        self._loss = LossOfMicroBatch(log_mel, LOSS_CHUNK_TOKENS)
        self._settings = settings
        self._continuous = ContinuousDecoder(
            model, prompts, log_mel, self._limit, settings.batch_size, settings.max_windows
        )

    @property
    def is_continuous(self) -> bool:
        """Whether examples leave a batch when they end, and others enter: see `stream`."""
        return self._settings.num_beams == 1 and not self.in_lockstep

    def stream(self, groups: Iterable[Sequence[Example]], *, with_loss: bool) -> Iterator[DecodedExamples]:
        """Decode groups of examples on this rank alone, in as many rows as the settings allow.

        Args:
            groups: at least one example each, the costliest first; see `groups_of`.
            with_loss: measure the loss of targets: in the forward pass over the prompts, which then includes them.

        Yields:
            Each example once, as soon as it has ended, and the loss of each group once.
        """
        assert self.is_continuous, "beam searches and lockstep decode whole batches"
        self._encoder.num_chunks = None
        for progress in self._continuous(groups, with_loss=with_loss):
            pairs = [(example, self._hypothesis(example, ids)) for example, ids in progress.ended]
            yield DecodedExamples(pairs, progress.loss_sum, progress.num_target_tokens)

    def __call__(self, examples: Sequence[Example]) -> list[Hypothesis]:
        """Decode examples on this rank alone: one hypothesis per example, in the same order."""
        return self.decode(examples, with_loss=False).hypotheses

    @torch.no_grad()
    def decode(
        self, examples: Sequence[Example], *, with_loss: bool, most_windows: int | None = None
    ) -> DecodedExamples:
        """Decode examples, and measure the loss of their targets.

        Args:
            examples: at least one.
            with_loss: measure the loss: one more forward pass of the language model, none of the encoder.
            most_windows: windows of the batch, maximum over ranks; needed in lockstep.

        Returns:
            Hypotheses in the order of the examples, and the loss.
        """
        if self.is_continuous:
            return self._decode_continuously(examples, with_loss)
        batch = collate(examples, self._prompts).to(self._device)
        features = self._log_mel(batch.pcm, batch.windows_per_example)
        self._encoder.num_chunks = most_windows and num_chunks(most_windows, self._encoder.windows_per_chunk)
        with self._encoder.holding(features, batch.windows_per_example) as numbers:
            # The loss comes first, so that all ranks encode in the same forward pass.
            loss_sum = float(self._loss(self._model, batch, numbers)) if with_loss else 0.0
            pairs = list(zip(examples, self._generate(examples, numbers), strict=True))
        return DecodedExamples(pairs, loss_sum, batch.num_target_tokens if with_loss else 0)

    def _decode_continuously(self, examples: Sequence[Example], with_loss: bool) -> DecodedExamples:
        parts = list(self.stream(groups_of(examples), with_loss=with_loss))
        found = {id(example): hypothesis for part in parts for example, hypothesis in part.pairs}
        return DecodedExamples(
            [(example, found[id(example)]) for example in examples],
            sum(part.loss_sum for part in parts),
            sum(part.num_target_tokens for part in parts),
        )

    def _generate(self, examples: Sequence[Example], numbers: Tensor) -> list[Hypothesis]:
        prompts, attention_mask = pad_left([example.prompt for example in examples], self._prompts.pad_id)
        limits = [self._limit(example) for example in examples]
        # transformers takes this if its own length is less; what it leaves here would lengthen every later cache.
        self._model._previous_max_cache_length = rounded_size(prompts.shape[1] + max(limits))
        with masked_attention(self._model), _without_generation_config(self._model):
            generated: Tensor = self._model.generate(
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
            self._hypothesis(example, ids[: self._limit(example)])
            for example, ids in zip(examples, completions, strict=True)
        ]

    @property
    def _device(self) -> torch.device:
        return self._log_mel.device

    def _limit(self, example: Example) -> int:
        by_length = MIN_NEW_TOKENS + math.ceil(self._settings.max_tokens_per_second * example.duration_seconds)
        return min(by_length, self._prompts.max_positions - len(example.prompt))

    def _hypothesis(self, example: Example, ids: list[int]) -> Hypothesis:
        """The hypothesis of token ids, which may go on behind `</s>`."""
        hit_limit = self._prompts.eos_id not in ids
        own = ids if hit_limit else ids[: ids.index(self._prompts.eos_id)]
        if not example.is_transcription:
            return Hypothesis(self._prompts.decode(own).strip(), None, len(own), hit_limit)
        transcript = self._prompts.transcript(own)
        return Hypothesis(transcript.text, transcript.language, len(own), hit_limit)


def groups_of(batch: Sequence[Item]) -> list[tuple[Item, ...]]:
    """A batch in the groups that enter the cache together."""
    size = -(-len(batch) // GROUPS_PER_BATCH)
    return [tuple(batch[first : first + size]) for first in range(0, len(batch), size)]


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


@contextmanager
def _without_generation_config(model: TrainedVoxtral) -> Iterator[None]:
    """Context in which `generate` takes nothing from a checkpoint's `generation_config.json`, such as penalties."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _search(settings: EvaluationConfig, in_lockstep: bool) -> dict[str, Any]:
    """Arguments of `generate` that choose tokens."""
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
