"""Hugging Face's `Seq2SeqTrainer` with generation from the prompts of a batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Seq2SeqTrainer
from transformers.trainer_pt_utils import LabelSmoother

from voxtral_dist.huggingface.evaluation_mixin import TranscriptionEvaluationMixin


class _CausalSmoother(LabelSmoother):  # type: ignore[misc]  # of a package without types
    """Label smoothing of a decoder-only model: a label is predicted by the position before it.

    transformers shifts the labels of the classes in its table of causal language models, where Voxtral is missing, so
    that it would train each position to repeat its own token.
    """

    def __call__(self, *arguments: Any, **named: Any) -> Tensor:
        loss: Tensor = super().__call__(*arguments, **named | {"shift_labels": True})
        return loss


class TranscriptionTrainer(TranscriptionEvaluationMixin, Seq2SeqTrainer):  # type: ignore[misc]  # of a package without types
    """A `Seq2SeqTrainer` with a `TranscriptionCollator`, whose evaluation generates from prompts alone.

    See `TranscriptionEvaluationMixin`, which does the same for a trainer and a data collator of your own.
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
            UserError: the data collator has no `prompts`.
        """
        super().__init__(*arguments, **named)
        if self.args.label_smoothing_factor:
            self.label_smoother = _CausalSmoother(epsilon=self.args.label_smoothing_factor)
