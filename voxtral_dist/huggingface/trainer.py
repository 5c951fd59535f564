"""Hugging Face's `Seq2SeqTrainer` with generation from the prompts of a batch."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from transformers import Seq2SeqTrainer
from transformers.trainer_pt_utils import LabelSmoother

from voxtral_dist.config import MIN_NEW_TOKENS, EvaluationConfig
from voxtral_dist.errors import UserError
from voxtral_dist.huggingface.collator import TranscriptionCollator

_MAX_TOKENS_PER_SECOND: float = EvaluationConfig.model_fields["max_tokens_per_second"].default


class _CausalSmoother(LabelSmoother):  # type: ignore[misc]  # of a package without types
    """Label smoothing of a decoder-only model: a label is predicted by the position before it.

    transformers shifts the labels of the classes in its table of causal language models, where Voxtral is missing, so
    that it would train each position to repeat its own token.
    """

    def __call__(self, *arguments: Any, **named: Any) -> Tensor:
        loss: Tensor = super().__call__(*arguments, **named | {"shift_labels": True})
        return loss


class TranscriptionTrainer(Seq2SeqTrainer):  # type: ignore[misc]  # of a package without types
    """A `Seq2SeqTrainer` with a `TranscriptionCollator`, whose evaluation generates from prompts alone.

    The published class is made for encoder-decoder models: it lets `generate` continue the whole input, which in a
    decoder-only model holds the transcript. `generation_max_length` and `max_new_tokens` count new tokens here; without
    them, a transcript may have as many for each second of audio as `EvaluationConfig.max_tokens_per_second` says.
    `label_smoothing_factor` works here; `Trainer` and `Seq2SeqTrainer` do not shift Voxtral's labels with it.

    Example:
        >>> from transformers import Seq2SeqTrainingArguments, VoxtralForConditionalGeneration
        >>> from voxtral_dist import ShardDataset, TranscriptionCollator, TranscriptionTrainer, WordErrorMetrics
        >>> collator = TranscriptionCollator.from_pretrained("models/tiny")
        >>> rows = ShardDataset("shards/speech")
        >>> trainer = TranscriptionTrainer(
        ...     model=VoxtralForConditionalGeneration.from_pretrained("models/tiny"),
        ...     args=Seq2SeqTrainingArguments(
        ...         "runs/trainer",
        ...         max_steps=1,
        ...         predict_with_generate=True,
        ...         remove_unused_columns=False,
        ...         use_cpu=True,
        ...         report_to="none",
        ...         save_strategy="no",
        ...     ),
        ...     train_dataset=rows,
        ...     eval_dataset=[rows[0], rows[1]],
        ...     data_collator=collator,
        ...     compute_metrics=WordErrorMetrics(collator.prompts),
        ... )
        >>> trained = trainer.train()
        >>> metrics = trainer.evaluate(max_new_tokens=8)
        >>> metrics["eval_num_reference_words"]
        10
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """A trainer; see `Seq2SeqTrainer`.

        Raises:
            UserError: the data collator is not a `TranscriptionCollator`.
        """
        super().__init__(*arguments, **named)
        if not isinstance(self.data_collator, TranscriptionCollator):
            raise UserError(
                f"`data_collator` must be a TranscriptionCollator, but is {type(self.data_collator).__name__} instead."
            )
        self._collator = self.data_collator
        if self.args.label_smoothing_factor:
            self.label_smoother = _CausalSmoother(epsilon=self.args.label_smoothing_factor)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The loss of a batch, its generated ids `(B, L)` without prompts, and its labels `(B, T)`."""
        if not self.args.predict_with_generate or prediction_loss_only:
            step: tuple[Tensor | None, Tensor | None, Tensor | None] = super().prediction_step(
                model, inputs, prediction_loss_only, ignore_keys
            )
            return step
        loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)
        prompts = self._collator.prompts_of(inputs)
        asked = self._generation(prompts, gen_kwargs or getattr(self, "_gen_kwargs", {}))
        _, generated, _ = super().prediction_step(model, prompts, False, ignore_keys, **asked)
        return loss, generated[:, prompts["input_ids"].shape[1] :], self._prepare_inputs(inputs)["labels"]

    def _generation(self, prompts: dict[str, Tensor], asked: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `generate` whose limit counts new tokens."""
        max_length = asked.get("max_length")
        limit = asked.get("max_new_tokens") or max_length or self._max_new_tokens(prompts["input_ids"].shape[1])
        own = {"pad_token_id": self._collator.prompts.pad_id, "eos_token_id": self._collator.prompts.eos_id}
        return own | asked | {"max_length": None, "max_new_tokens": limit}

    def _max_new_tokens(self, num_prompt_tokens: int) -> int:
        prompts = self._collator.prompts
        tokens_per_second = prompts.audio_tokens_per_window / prompts.window_seconds
        limit = MIN_NEW_TOKENS + math.ceil(_MAX_TOKENS_PER_SECOND * num_prompt_tokens / tokens_per_second)
        return min(limit, prompts.max_positions - num_prompt_tokens)
