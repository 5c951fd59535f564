"""Word and character errors as integer counts, which are summed first and divided once, last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jiwer

from voxtral_dist.scoring.alignment import AlignedWord, Alignment, align_words
from voxtral_dist.scoring.normalizer import Normalizer
from voxtral_dist.scoring.normalizer import normalizer as named_normalizer
from voxtral_dist.text.steps import fold
from voxtral_dist.text.word_list import WordList


@dataclass(frozen=True)
class ErrorCounts:
    """Edits of a least-cost alignment and the length of the reference, both in words or both in characters.

    Example:
        >>> from voxtral_dist import ErrorCounts
        >>> both = ErrorCounts(substitutions=1, reference_length=3) + ErrorCounts(deletions=1, reference_length=1)
        >>> both.errors, both.rate
        (2, 0.5)
    """

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    reference_length: int = 0

    def __add__(self, other: ErrorCounts) -> ErrorCounts:
        return ErrorCounts(
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
            self.reference_length + other.reference_length,
        )

    def __sub__(self, other: ErrorCounts) -> ErrorCounts:
        return ErrorCounts(
            self.substitutions - other.substitutions,
            self.deletions - other.deletions,
            self.insertions - other.insertions,
            self.reference_length - other.reference_length,
        )

    @property
    def errors(self) -> int:
        """Substitutions, deletions and insertions together."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float | None:
        """Errors divided by the reference length; None where the reference is empty."""
        return self.errors / self.reference_length if self.reference_length else None


def word_errors(
    references: Sequence[str], hypotheses: Sequence[str], normalizer: Normalizer | None = None
) -> ErrorCounts:
    """Word errors of a set of transcripts; the `rate` of the counts is the WER.

    Args:
        references: one text per utterance.
        hypotheses: the same number of texts, in the same order.
        normalizer: applied to both; `normalizer("basic")` by default.

    Example:
        >>> from voxtral_dist import normalizer, word_errors
        >>> word_errors(["Hello, world!", "good night"], ["hello word", "good night"])
        ErrorCounts(substitutions=1, deletions=0, insertions=0, reference_length=4)
        >>> word_errors(["Hello, world!", "good night"], ["hello word", "good night"]).rate
        0.25
        >>> word_errors(["Hello, world!"], ["hello world"], normalizer("none")).rate
        1.0
    """
    if isinstance(references, str) or isinstance(hypotheses, str):
        raise TypeError("References and hypotheses must be lists of texts, but one is a string: wrap it in a list.")
    apply = (normalizer or named_normalizer("basic")).apply
    pairs = zip(references, hypotheses, strict=True)
    counts = (count_word_errors(align_words(apply(one), apply(other))) for one, other in pairs)
    return sum(counts, ErrorCounts())


def count_word_errors(alignment: Iterable[AlignedWord]) -> ErrorCounts:
    """Word errors of an alignment, or of a part of one."""
    kinds = Counter(word.kind for word in alignment)
    reference_length = kinds["equal"] + kinds["substitute"] + kinds["delete"]
    return ErrorCounts(kinds["substitute"], kinds["delete"], kinds["insert"], reference_length)


def count_biased_errors(alignment: Alignment, listed: WordList) -> ErrorCounts:
    """Word errors of listed words, as the B-WER counts them. All other errors of the alignment belong to the U-WER.

    A substitution or deletion counts where its word of the reference is part of a listed entry, an insertion where the
    inserted word is one of those words. Source: Le et al., "Contextualized Streaming End-to-End Speech Recognition with
    Trie-Based Deep Biasing and Shallow Fusion" (arXiv 2104.02194), and its scoring script.

    Args:
        alignment: of a normalized reference and hypothesis.
        listed: all words of interest, whichever of them a prompt listed, so that lists of any size are comparable.
    """
    words = [word.reference for word in alignment if word.reference is not None]
    is_listed = _find_listed(words, listed)
    biased = {fold(word) for word, counts in zip(words, is_listed, strict=True) if counts}
    listed_here = iter(is_listed)
    return count_word_errors(
        word
        for word in alignment
        if (next(listed_here) if word.reference is not None else fold(word.hypothesis or "") in biased)
    )


def _find_listed(words: Sequence[str], listed: WordList) -> list[bool]:
    """Whether each word is part of an entry. A normalizer may have left several folded words in one."""
    parts = [(place, part) for place, word in enumerate(words) for part in fold(word).split()]
    is_listed = [False] * len(words)
    for occurrence in listed.find([part for _, part in parts]):
        for place, _ in parts[occurrence.start : occurrence.end]:
            is_listed[place] = True
    return is_listed


def count_character_errors(reference: str, hypothesis: str) -> ErrorCounts:
    """Character errors between two normalized texts; a space between words is a character."""
    reference, hypothesis = reference.strip(), hypothesis.strip()
    if not reference or not hypothesis:
        return ErrorCounts(0, len(reference), len(hypothesis), len(reference))
    aligned = jiwer.process_characters(reference, hypothesis)
    return ErrorCounts(aligned.substitutions, aligned.deletions, aligned.insertions, len(reference))
