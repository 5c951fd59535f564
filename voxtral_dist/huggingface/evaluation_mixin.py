"""Evaluation by generation for trainers that are derived from Hugging Face's `Seq2SeqTrainer`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from voxtral_dist.config import MIN_NEW_TOKENS, EvaluationConfig
from voxtral_dist.errors import UserError
from voxtral_dist.huggingface.prompt_batches import prompts_of
from voxtral_dist.model.prompts import VoxtralPrompts

if TYPE_CHECKING:
    from transformers import Seq2SeqTrainer as _Trainer
else:
    _Trainer = object

_MAX_TOKENS_PER_SECOND: float = EvaluationConfig.model_fields["max_tokens_per_second"].default

PredictionStep = tuple[Tensor | None, Tensor | None, Tensor | None]


class TranscriptionEvaluationMixin(_Trainer):  # type: ignore[misc]  # of a package without types
    """A `prediction_step` that generates from the prompts of a batch, for a trainer with any data collator.

    `Seq2SeqTrainer` is made for encoder-decoder models: it lets `generate` continue the whole input, which in a
    decoder-only model holds the transcript. `generation_max_length` and `max_new_tokens` count new tokens here; without
    them, a transcript may have as many for each second of audio as `EvaluationConfig.max_tokens_per_second` says.

    Name it before the trainer. Batches need `input_ids`, `attention_mask`, `input_features` and `labels`, which are
    -100 on prompts and padding; prompts are the positions that are attended to and have no label.

    Attributes:
        prompts: of the model; a subclass sets it, unless its data collator has an attribute of this name.

    Example:
        >>> from transformers import Seq2SeqTrainer
        >>> from voxtral_dist import TranscriptionEvaluationMixin, VoxtralPrompts
        >>> class MyTrainer(TranscriptionEvaluationMixin, Seq2SeqTrainer):
        ...     prompts = VoxtralPrompts.from_pretrained("models/tiny")
        >>> MyTrainer.prediction_step is Seq2SeqTrainer.prediction_step
        False
    """

    prompts: VoxtralPrompts

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """A trainer; see `Seq2SeqTrainer`.

        Raises:
            UserError: neither the trainer nor its data collator has `prompts`.
        """
        super().__init__(*arguments, **named)
        if not hasattr(self, "prompts"):
            found = getattr(self.data_collator, "prompts", None)
            if not isinstance(found, VoxtralPrompts):
                raise UserError(
                    f"{type(self).__name__} needs the attribute `prompts` = VoxtralPrompts.from_pretrained(...), "
                    f"because its data collator {type(self.data_collator).__name__} has none."
                )
            self.prompts = found

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> PredictionStep:
        """The loss of a batch, its generated ids `(B, L)` without prompts, and its labels `(B, T)`.

        Raises:
            UserError: a row has labels on its whole input.
        """
        if not self.args.predict_with_generate or prediction_loss_only:
            step: PredictionStep = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            return step
        loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)
        prompts = prompts_of(inputs, self.prompts.pad_id)
        asked = self._generation(prompts, gen_kwargs or getattr(self, "_gen_kwargs", {}))
        _, generated, _ = super().prediction_step(model, prompts, False, ignore_keys, **asked)
        return loss, generated[:, prompts["input_ids"].shape[1] :], self._prepare_inputs(inputs)["labels"]

    def _generation(self, prompts: dict[str, Tensor], asked: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `generate` whose limit counts new tokens."""
        max_length = asked.get("max_length")
        limit = asked.get("max_new_tokens") or max_length or self._max_new_tokens(prompts["input_ids"].shape[1])
        own = {"pad_token_id": self.prompts.pad_id, "eos_token_id": self.prompts.eos_id}
        return own | asked | {"max_length": None, "max_new_tokens": limit}

    def _max_new_tokens(self, num_prompt_tokens: int) -> int:
        tokens_per_second = self.prompts.audio_tokens_per_window / self.prompts.window_seconds
        limit = MIN_NEW_TOKENS + math.ceil(_MAX_TOKENS_PER_SECOND * num_prompt_tokens / tokens_per_second)
        return min(limit, self.prompts.max_positions - num_prompt_tokens)
