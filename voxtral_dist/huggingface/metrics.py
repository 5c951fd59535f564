"""The word error rate of generated transcripts, as the `compute_metrics` of a `Seq2SeqTrainer`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.data.examples.micro_batch import IGNORED_LABEL
from voxtral_dist.errors import UserError
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.scoring.normalizer import normalizer
from voxtral_dist.scoring.word_errors import word_errors

if TYPE_CHECKING:
    from transformers import EvalPrediction

Ids = NDArray[np.int64]


class WordErrorMetrics:
    """Word errors of all utterances, summed as integers and divided once.

    Example:
        >>> import numpy as np
        >>> from transformers import EvalPrediction
        >>> from voxtral_dist import VoxtralPrompts, WordErrorMetrics
        >>> prompts = VoxtralPrompts.from_pretrained("models/tiny")
        >>> metrics = WordErrorMetrics(prompts)
        >>> answer, reference = prompts.completion("one too"), prompts.completion("One, two.")
        >>> metrics(EvalPrediction(predictions=np.array([answer]), label_ids=np.array([reference])))
        {'wer': 0.5, 'num_word_errors': 1, 'num_reference_words': 2}
    """

    def __init__(self, prompts: VoxtralPrompts, normalizer_name: str = "basic") -> None:
        """Metrics of one tokenizer.

        Args:
            prompts: decode ids.
            normalizer_name: applied to references and hypotheses; see `voxtral_dist.normalizer`.

        Raises:
            UserError: there is no such normalizer.
        """
        self._prompts = prompts
        self._normalizer = normalizer(normalizer_name)
        transcription, instruction = prompts.transcription(None, 1), prompts.instruction("", 1)
        self._begin = transcription[0]
        self._ends = (transcription[-1], instruction[-1])

    def __call__(self, prediction: EvalPrediction) -> dict[str, float | int]:
        """The metrics of an evaluation.

        Args:
            prediction: generated ids `(N, L)` and labels `(N, T)`, both filled up with -100. A language tag before a
                transcript is not part of its text. Prompts in front of generated ids are skipped.

        Returns:
            `wer`, which is NaN without words in the references, `num_word_errors` and `num_reference_words`.

        Raises:
            UserError: the predictions are logits, or hold the references.
        """
        generated, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        if generated.ndim != 2:
            raise UserError(
                f"Predictions must be generated ids of the shape (N, L), but have the shape {generated.shape} instead: "
                "use TranscriptionTrainer with `predict_with_generate=True`."
            )
        _refuse_references(generated, labels)
        counts = word_errors(
            [self._text(row) for row in labels], [self._text(row) for row in generated], self._normalizer
        )
        return {
            "wer": math.nan if counts.rate is None else counts.rate,
            "num_word_errors": counts.errors,
            "num_reference_words": counts.reference_length,
        }

    def _text(self, row: Ids) -> str:
        """The transcript in a row: behind a prompt, where there is one, and up to the first `</s>`."""
        ids = self._without_prompt(row[row != IGNORED_LABEL].tolist())
        if self._prompts.eos_id in ids:
            ids = ids[: ids.index(self._prompts.eos_id)]
        return self._prompts.transcript(ids).text

    def _without_prompt(self, ids: list[int]) -> list[int]:
        first = next((place for place, token in enumerate(ids) if token != self._prompts.pad_id), 0)
        if ids[first : first + 1] != [self._begin]:
            return ids
        # A transcription's prompt ends with [TRANSCRIBE], an instruction's with [/INST].
        end = next((ids.index(token) for token in self._ends if token in ids), first)
        return ids[end + 1 :]


def _refuse_references(generated: Ids, labels: Ids) -> None:
    """Refuse predictions that begin with the inputs of training: they hold each reference where its label is."""
    counted = labels != IGNORED_LABEL
    width = labels.shape[1]
    if generated.shape[1] > width and not counted[:, 0].any() and (generated[:, :width] == labels)[counted].all():
        raise UserError(
            "The predictions hold the references: Seq2SeqTrainer lets `generate` continue whole inputs, transcripts "
            "included. Use TranscriptionTrainer, which gives it the prompts alone."
        )
