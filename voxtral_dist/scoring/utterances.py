"""Single utterances of a test set: decoded, and scored against their references."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from voxtral_dist.config import ErrorRate
from voxtral_dist.scoring.alignment import align_words
from voxtral_dist.scoring.normalizer import Normalizer
from voxtral_dist.scoring.repetition import has_repetition_loop
from voxtral_dist.scoring.word_errors import (
    ErrorCounts,
    count_biased_errors,
    count_character_errors,
    count_punctuation_errors,
    count_word_errors,
)
from voxtral_dist.text.scripts import has_spaces_between_words
from voxtral_dist.text.word_list import WordList


@dataclass(frozen=True, kw_only=True)
class DecodedUtterance:
    """An utterance of a test set with the hypothesis of a model.

    Attributes:
        utterance_id: its number in the index.
        language, detected_language: ISO 639-1 codes; None where unknown, and where the model named no language.
        duration_seconds: None where unknown.
        reference, hypothesis: before any normalization.
        hit_limit: whether the token limit ended the hypothesis.
        asks_for_language: whether the prompt omitted the language, so that the model had to name it.
        context: of the prompt; empty without one.
        fields: values of the utterance's json that slices and intervals need.
    """

    utterance_id: int
    key: str
    language: str | None
    duration_seconds: float | None
    reference: str
    hypothesis: str
    hit_limit: bool
    detected_language: str | None = None
    asks_for_language: bool = False
    context: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ScoredUtterance:
    """A decoded utterance with the counts of its errors.

    Attributes:
        words, characters: errors after the normalizer.
        orthographic_words, orthographic_characters: errors where case and punctuation count.
        biased_words: errors of listed words; None where the test set has no list.
        punctuation: errors of punctuation marks; None in files of earlier versions.
        has_spaces: whether the reference is written with spaces between words. Else its WER is all or nothing, and
            spaces are no characters of its CER.
    """

    decoded: DecodedUtterance
    words: ErrorCounts
    characters: ErrorCounts
    orthographic_words: ErrorCounts
    orthographic_characters: ErrorCounts
    biased_words: ErrorCounts | None
    has_repetition_loop: bool
    punctuation: ErrorCounts | None = None
    has_spaces: bool = True

    def counts(self, metric: ErrorRate) -> ErrorCounts:
        """The errors that the WER or the CER counts."""
        return self.words if metric == "wer" else self.characters


def score_utterance(
    decoded: DecodedUtterance, normalizer: Normalizer, listed: WordList | None = None
) -> ScoredUtterance:
    """Count the errors of a hypothesis after normalization, and those of listed words if there is a list."""
    reference, hypothesis = normalized_pair(decoded, normalizer)
    exact_reference, exact_hypothesis = normalized_pair(decoded, normalizer.orthographic)
    has_spaces = has_spaces_between_words(decoded.reference, decoded.language)
    alignment = align_words(reference, hypothesis)
    return ScoredUtterance(
        decoded=decoded,
        words=count_word_errors(alignment),
        characters=count_character_errors(reference, hypothesis, has_spaces),
        orthographic_words=count_word_errors(align_words(exact_reference, exact_hypothesis)),
        orthographic_characters=count_character_errors(exact_reference, exact_hypothesis, has_spaces),
        punctuation=count_punctuation_errors(exact_reference, exact_hypothesis),
        biased_words=None if listed is None else count_biased_errors(alignment, listed),
        has_repetition_loop=has_repetition_loop(decoded.hypothesis, decoded.reference),
        has_spaces=has_spaces,
    )


def normalized_pair(decoded: DecodedUtterance, normalizer: Normalizer) -> tuple[str, str]:
    """The reference and the hypothesis of an utterance after normalization."""
    return (
        normalizer.apply(decoded.reference, decoded.language),
        normalizer.apply(decoded.hypothesis, decoded.language),
    )
