"""One utterance of a test set: what a model made of it, and how far that is from its reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from voxtral_dist.scoring.alignment import align_words
from voxtral_dist.scoring.normalizer import Normalizer
from voxtral_dist.scoring.repetition import has_repetition_loop
from voxtral_dist.scoring.word_errors import (
    ErrorCounts,
    count_biased_errors,
    count_character_errors,
    count_word_errors,
)
from voxtral_dist.text.word_list import WordList

# What is counted of an utterance, as the keys of its line begin; `word_substitutions` is one of them.
COUNTED = ("word", "character", "orthographic_word", "orthographic_character", "biased_word")


@dataclass(frozen=True, kw_only=True)
class DecodedUtterance:
    """An utterance of a test set with what a model made of it.

    language, detected_language: ISO 639-1 codes, None where not known or not named. duration_seconds: None where not
    known. asks_for_language: whether the prompt left it to the model to name the language. context: that of the prompt.
    fields: those of the sample's json that slices and intervals need.
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
class ScoredUtterance(DecodedUtterance):
    """One line of `NAME.jsonl`.

    words, characters: edits after the normalizer; the orthographic ones, in which case and punctuation count.
    biased_words: the edits of listed words, where the test set has a list.
    """

    words: ErrorCounts
    characters: ErrorCounts
    orthographic_words: ErrorCounts
    orthographic_characters: ErrorCounts
    biased_words: ErrorCounts | None = None
    has_repetition_loop: bool = False

    def row(self) -> dict[str, object]:
        """The utterance as plain types, with the counts flat: `word_substitutions` and so on."""
        row = asdict(self)
        for name in COUNTED:
            counts = row.pop(f"{name}s")
            row |= {f"{name}_{kind}": count for kind, count in (counts or {}).items()}
        return row


def score_utterance(
    utterance: DecodedUtterance, normalizer: Normalizer, listed: WordList | None = None
) -> ScoredUtterance:
    """The edits between reference and hypothesis after normalization; both are kept as they were."""
    texts = utterance.reference, utterance.hypothesis
    reference, hypothesis = map(normalizer.apply, texts)
    exact_reference, exact_hypothesis = map(normalizer.orthographic.apply, texts)
    alignment = align_words(reference, hypothesis)
    return ScoredUtterance(
        **vars(utterance),
        words=count_word_errors(alignment),
        characters=count_character_errors(reference, hypothesis),
        orthographic_words=count_word_errors(align_words(exact_reference, exact_hypothesis)),
        orthographic_characters=count_character_errors(exact_reference, exact_hypothesis),
        biased_words=None if listed is None else count_biased_errors(alignment, listed),
        has_repetition_loop=has_repetition_loop(utterance.hypothesis, utterance.reference),
    )
