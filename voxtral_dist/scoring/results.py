"""The result of a test set: integer counts, and the rates that follow from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from voxtral_dist.config import ErrorRate
from voxtral_dist.output.counting import counted
from voxtral_dist.scoring.deciding_rate import deciding_rate
from voxtral_dist.scoring.error_rates import ErrorRates, normalized_rates, orthographic_rates
from voxtral_dist.scoring.grouping import Grouping
from voxtral_dist.scoring.normalizer import Normalizer
from voxtral_dist.scoring.slices import score_slices
from voxtral_dist.scoring.utterances import ScoredUtterance
from voxtral_dist.scoring.word_errors import ErrorCounts


@dataclass(frozen=True)
class LanguageIdentification:
    """Language detection among utterances whose language is known but was omitted from the prompt.

    num_undetected: utterances for which the model named no language; they count as wrong.
    """

    num_utterances: int
    num_correct: int
    num_undetected: int

    @property
    def accuracy(self) -> float:
        """Fraction of utterances whose language was detected."""
        return self.num_correct / self.num_utterances


@dataclass(frozen=True)
class BiasedErrors:
    """Word errors of listed words (B-WER) and of all other words (U-WER).

    num_distractors: listed words of each prompt that its reference does not hold; None where prompts had no list.
    """

    num_distractors: int | None
    biased_words: ErrorCounts
    unbiased_words: ErrorCounts

    @property
    def biased_wer(self) -> float | None:
        """B-WER; None where no reference has a listed word."""
        return self.biased_words.rate

    @property
    def unbiased_wer(self) -> float | None:
        """U-WER; None where references have no other words."""
        return self.unbiased_words.rate


@dataclass(frozen=True)
class Measurements:
    """Measurements that need the model; None where they were not made.

    Attributes:
        decode_seconds: wall time of decoding all utterances, maximum over ranks.
        loss: mean cross entropy of the target tokens, in nats.
    """

    decode_seconds: float | None = None
    loss: float | None = None

    @property
    def perplexity(self) -> float | None:
        """The exponential of the loss; None without a loss, and where it exceeds the range of a float."""
        try:
            return None if self.loss is None else math.exp(self.loss)
        except OverflowError:
            return None


@dataclass(frozen=True, kw_only=True)
class TestSetResult:
    """The result of a test set, stored as `NAME.json`.

    Attributes:
        normalizer, orthographic_normalizer: labels of the normalizers of `normalized` and `orthographic`.
        normalized: error rates after the normalizer.
        orthographic: error rates where case and punctuation count.
        punctuation: errors of punctuation marks; None where they were not counted.
        num_without_spaces: references in languages without spaces between words, whose WER is all or nothing.
        num_empty_references: references without words after the normalizer; their hypotheses count as insertions.
        num_limit_hits: hypotheses ended by the token limit.
        slices: normalized error rates by field and value.
        speaker_field: the field that names the speaker of an utterance.
        language_identification: None where no prompt omitted a known language.
        biased: None without a list of words.
    """

    __test__ = False  # keeps pytest from collecting it

    normalizer: str
    normalized: ErrorRates
    orthographic_normalizer: str
    orthographic: ErrorRates
    num_empty_hypotheses: int
    num_empty_references: int
    num_limit_hits: int
    num_repetition_loops: int
    slices: dict[str, dict[str, ErrorRates]]
    speaker_field: str
    measured: Measurements
    language_identification: LanguageIdentification | None
    biased: BiasedErrors | None
    punctuation: ErrorCounts | None = None
    num_without_spaces: int = 0

    def deciding_rate(self, configured: ErrorRate | None = None) -> ErrorRate:
        """The error rate by which the set is judged; `configured` by a run's selection, if it has one for this set."""
        return deciding_rate(self.num_without_spaces, self.normalized.num_utterances, configured)

    @property
    def rtfx(self) -> float | None:
        """Seconds of audio per second of decoding; None where either is unknown."""
        amount, seconds = self.normalized.audio_seconds, self.measured.decode_seconds
        return amount / seconds if amount is not None and seconds else None

    def metrics(self) -> dict[str, float | int | None]:
        """The values for a row of `metrics.jsonl`; values that only some test sets have are omitted from the others."""
        metrics: dict[str, float | int | None] = {
            "wer": self.normalized.wer,
            "cer": self.normalized.cer,
            "orthographic_wer": self.orthographic.wer,
            "orthographic_cer": self.orthographic.cer,
            "mer": self.normalized.words.match_error_rate,
            "wil": self.normalized.words.information_lost,
        }
        if self.punctuation is not None and self.punctuation.match_error_rate is not None:
            metrics["punctuation_error_rate"] = self.punctuation.match_error_rate
        measured = {"loss": self.measured.loss, "perplexity": self.measured.perplexity, "rtfx": self.rtfx}
        metrics |= {name: value for name, value in measured.items() if value is not None}
        if self.language_identification is not None:
            metrics["language_accuracy"] = self.language_identification.accuracy
        if self.biased is not None:
            metrics |= {"biased_wer": self.biased.biased_wer, "unbiased_wer": self.biased.unbiased_wer}
        return metrics | {
            "num_utterances": self.normalized.num_utterances,
            "num_without_spaces": self.num_without_spaces,
            "num_empty_hypotheses": self.num_empty_hypotheses,
            "num_limit_hits": self.num_limit_hits,
            "num_repetition_loops": self.num_repetition_loops,
        }

    def __str__(self) -> str:
        said = [f"WER {percent(self.normalized.wer)}"]
        if self.num_without_spaces:
            said.insert(0, f"CER {percent(self.normalized.cer)}")
        if self.biased is not None:
            said.append(f"B-WER {percent(self.biased.biased_wer)}, U-WER {percent(self.biased.unbiased_wer)}")
        if self.language_identification is not None:
            said.append(f"language accuracy {percent(self.language_identification.accuracy)}")
        return ", ".join(
            [*said, f"{counted(self.normalized.num_utterances, 'utterance')}, normalizer {self.normalizer}"]
        )


def score_test_set(
    utterances: Sequence[ScoredUtterance],
    normalizer: Normalizer,
    num_distractors: int | None = None,
    grouping: Grouping | None = None,
    measured: Measurements | None = None,
) -> TestSetResult:
    """Sum the counts of all utterances of a test set.

    Args:
        utterances: each scored by `normalizer`.
        normalizer: named in the result.
        num_distractors: of the lists in prompts; None where prompts had no list.
        grouping: fields of slices, and the field of the speaker.
        measured: what was measured while decoding.
    """
    grouping = grouping or Grouping()
    return TestSetResult(
        normalizer=normalizer.label,
        normalized=normalized_rates(utterances, grouping),
        orthographic_normalizer=normalizer.orthographic.label,
        orthographic=orthographic_rates(utterances, grouping),
        punctuation=_punctuation(utterances),
        num_without_spaces=sum(not one.has_spaces for one in utterances),
        num_empty_hypotheses=sum(not one.decoded.hypothesis.strip() for one in utterances),
        num_empty_references=sum(not one.words.reference_length for one in utterances),
        num_limit_hits=sum(one.decoded.hit_limit for one in utterances),
        num_repetition_loops=sum(one.has_repetition_loop for one in utterances),
        slices=score_slices(utterances, grouping),
        speaker_field=grouping.speaker_field,
        measured=measured or Measurements(),
        language_identification=_language_identification(utterances),
        biased=_biased(utterances, num_distractors),
    )


def percent(rate: float | None) -> str:
    """A rate such as `12.34 %`, or `n/a` for None."""
    return "n/a" if rate is None else f"{100 * rate:.2f} %"


def _punctuation(utterances: Sequence[ScoredUtterance]) -> ErrorCounts | None:
    counts = [one.punctuation for one in utterances if one.punctuation is not None]
    return sum(counts, ErrorCounts()) if len(counts) == len(utterances) else None


def _language_identification(utterances: Sequence[ScoredUtterance]) -> LanguageIdentification | None:
    decoded = [one.decoded for one in utterances if one.decoded.asks_for_language and one.decoded.language is not None]
    if not decoded:
        return None
    num_correct = sum(one.detected_language == one.language for one in decoded)
    num_undetected = sum(one.detected_language is None for one in decoded)
    return LanguageIdentification(len(decoded), num_correct, num_undetected)


def _biased(utterances: Sequence[ScoredUtterance], num_distractors: int | None) -> BiasedErrors | None:
    counts = [utterance.biased_words for utterance in utterances if utterance.biased_words is not None]
    if not counts:
        return None
    biased = sum(counts, ErrorCounts())
    return BiasedErrors(num_distractors, biased, sum((one.words for one in utterances), ErrorCounts()) - biased)
