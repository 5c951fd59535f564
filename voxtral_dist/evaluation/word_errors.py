"""Edits between transcripts as integers: the only thing that is ever added up, and divided once, last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jiwer
import numpy as np

_NUM_RESAMPLES = 1000


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

    @property
    def errors(self) -> int:
        """All edits."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float | None:
        """Edits per unit of the reference; None where the reference is empty."""
        return self.errors / self.reference_length if self.reference_length else None


def count_word_errors(reference: str, hypothesis: str) -> ErrorCounts:
    """Word edits between two normalized texts. An empty hypothesis deletes every word of its reference."""
    words, guessed = reference.split(), hypothesis.split()
    # jiwer takes no empty reference; neither case needs an alignment.
    if not words or not guessed:
        return ErrorCounts(0, len(words), len(guessed), len(words))
    aligned = jiwer.process_words(" ".join(words), " ".join(guessed))
    return ErrorCounts(aligned.substitutions, aligned.deletions, aligned.insertions, len(words))


def count_character_errors(reference: str, hypothesis: str) -> ErrorCounts:
    """Character edits between two normalized texts, spaces between words included."""
    reference, hypothesis = reference.strip(), hypothesis.strip()
    if not reference or not hypothesis:
        return ErrorCounts(0, len(reference), len(hypothesis), len(reference))
    aligned = jiwer.process_characters(reference, hypothesis)
    return ErrorCounts(aligned.substitutions, aligned.deletions, aligned.insertions, len(reference))


def bootstrap_interval(counts: Sequence[ErrorCounts], seed: int = 0) -> tuple[float, float] | None:
    """The central 95 % of the error rate when utterances are drawn again with replacement.

    Source: Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation" (ICASSP 2004).
    None where no utterance has a reference.
    """
    errors = np.array([count.errors for count in counts])
    lengths = np.array([count.reference_length for count in counts])
    if not lengths.sum():
        return None
    generator = np.random.default_rng(seed)
    rates = np.empty(_NUM_RESAMPLES)
    for resample in range(_NUM_RESAMPLES):
        drawn = generator.integers(0, len(counts), len(counts))
        rates[resample] = errors[drawn].sum() / max(1, lengths[drawn].sum())
    low, high = np.quantile(rates, [0.025, 0.975])
    return float(low), float(high)
