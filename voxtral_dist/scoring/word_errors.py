"""Edits between transcripts as integers: the only thing that is ever added up, and divided once, last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jiwer

from voxtral_dist.scoring.alignment import AlignedWord, Alignment
from voxtral_dist.text.steps import fold
from voxtral_dist.text.word_list import WordList


@dataclass(frozen=True)
class ErrorCounts:
    """Edits of a least-cost alignment, and the length of the reference, in words or in characters."""

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
        """All edits."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float | None:
        """Edits per unit of the reference; None where the reference is empty."""
        return self.errors / self.reference_length if self.reference_length else None


def count_word_errors(alignment: Iterable[AlignedWord]) -> ErrorCounts:
    """Word edits of an alignment, or of a part of one."""
    kinds = Counter(word.kind for word in alignment)
    reference_length = kinds["equal"] + kinds["substitute"] + kinds["delete"]
    return ErrorCounts(kinds["substitute"], kinds["delete"], kinds["insert"], reference_length)


def count_biased_errors(alignment: Alignment, listed: WordList) -> ErrorCounts:
    """The part of `count_word_errors` that concerns listed words: the counts of the B-WER; the rest are the U-WER's.

    A substitution or deletion counts where the word of the reference belongs to an entry that the reference holds, an
    insertion where the inserted word is one of these words. Source: Le et al., "Contextualized Streaming End-to-End
    Speech Recognition with Trie-Based Deep Biasing and Shallow Fusion" (arXiv 2104.02194), and its scoring script.

    Args:
        alignment: of a normalized reference and hypothesis.
        listed: all words of interest, whatever part of them a prompt listed: so lists of any size can be compared.
    """
    words = [word.reference for word in alignment if word.reference is not None]
    is_listed = _listed_places(words, listed)
    biased = {fold(word) for word, counts in zip(words, is_listed, strict=True) if counts}
    listed_here = iter(is_listed)
    return count_word_errors(
        word
        for word in alignment
        if (next(listed_here) if word.reference is not None else fold(word.hypothesis or "") in biased)
    )


def _listed_places(words: Sequence[str], listed: WordList) -> list[bool]:
    """Which words belong to an entry, however many words their normalizer makes of what the list has as one."""
    parts = [(place, part) for place, word in enumerate(words) for part in fold(word).split()]
    is_listed = [False] * len(words)
    for occurrence in listed.find([part for _, part in parts]):
        for place, _ in parts[occurrence.start : occurrence.end]:
            is_listed[place] = True
    return is_listed


def count_character_errors(reference: str, hypothesis: str) -> ErrorCounts:
    """Character edits between two normalized texts, spaces between words included."""
    reference, hypothesis = reference.strip(), hypothesis.strip()
    if not reference or not hypothesis:
        return ErrorCounts(0, len(reference), len(hypothesis), len(reference))
    aligned = jiwer.process_characters(reference, hypothesis)
    return ErrorCounts(aligned.substitutions, aligned.deletions, aligned.insertions, len(reference))
