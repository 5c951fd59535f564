"""Edits between transcripts as integers: the only thing that is ever added up, and divided once, last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jiwer
import numpy as np

from voxtral_dist.data.context import WordList
from voxtral_dist.data.texts import fold

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


def count_word_errors(reference: str, hypothesis: str) -> ErrorCounts:
    """Word edits between two normalized texts. An empty hypothesis deletes every word of its reference."""
    words, guessed = reference.split(), hypothesis.split()
    # jiwer takes no empty reference; neither case needs an alignment.
    if not words or not guessed:
        return ErrorCounts(0, len(words), len(guessed), len(words))
    aligned = jiwer.process_words(" ".join(words), " ".join(guessed))
    return ErrorCounts(aligned.substitutions, aligned.deletions, aligned.insertions, len(words))


def count_biased_errors(reference: str, hypothesis: str, listed: WordList) -> ErrorCounts:
    """The part of `count_word_errors` that concerns listed words: the counts of the B-WER; the rest are the U-WER's.

    A substitution or deletion counts where the word of the reference belongs to an entry that the reference holds, an
    insertion where the inserted word is one of these words. Source: Le et al., "Contextualized Streaming End-to-End
    Speech Recognition with Trie-Based Deep Biasing and Shallow Fusion" (arXiv 2104.02194), and its scoring script.

    Args:
        reference: normalized.
        hypothesis: normalized.
        listed: all words of interest, whatever part of them a prompt listed: so lists of any size can be compared.
    """
    words, guessed = reference.split(), hypothesis.split()
    is_biased = _listed_places(words, listed)
    biased = {fold(word) for word, counts in zip(words, is_biased, strict=True) if counts}
    inserted_counts = [fold(word) in biased for word in guessed]
    if not words or not guessed:
        return ErrorCounts(0, sum(is_biased), sum(inserted_counts), sum(is_biased))
    edits = {"substitute": 0, "delete": 0, "insert": 0, "equal": 0}
    for chunk in jiwer.process_words(" ".join(words), " ".join(guessed)).alignments[0]:
        if chunk.type == "insert":
            edits["insert"] += sum(inserted_counts[chunk.hyp_start_idx : chunk.hyp_end_idx])
        else:
            edits[chunk.type] += sum(is_biased[chunk.ref_start_idx : chunk.ref_end_idx])
    return ErrorCounts(edits["substitute"], edits["delete"], edits["insert"], sum(is_biased))


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
