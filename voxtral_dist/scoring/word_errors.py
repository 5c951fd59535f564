"""Word and character errors as integer counts, which are summed first and divided once, last."""

from __future__ import annotations

import unicodedata
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
    def num_correct(self) -> int:
        """Words or characters of the reference that the hypothesis has."""
        return self.reference_length - self.substitutions - self.deletions

    @property
    def match_error_rate(self) -> float | None:
        """Errors divided by all steps of the alignment (MER), at most 1; None where both texts are empty.

        Source: Morris, Maier and Green, "From WER and RIL to MER and WIL" (Interspeech 2004).
        """
        num_steps = self.num_correct + self.errors
        return self.errors / num_steps if num_steps else None

    @property
    def information_lost(self) -> float | None:
        """Word information lost (WIL): `1 - H / N * H / P`, where H of N words are correct, and the hypothesis has P.

        None where either text is empty. Source: as for `match_error_rate`.
        """
        guessed_length = self.num_correct + self.substitutions + self.insertions
        if not self.reference_length or not guessed_length:
            return None
        return 1 - self.num_correct / self.reference_length * self.num_correct / guessed_length

    @property
    def rate(self) -> float | None:
        """Errors divided by the reference length; None where the reference is empty."""
        return self.errors / self.reference_length if self.reference_length else None


def word_errors(
    references: Sequence[str],
    hypotheses: Sequence[str],
    normalizer: Normalizer | None = None,
    language: str | None = None,
) -> ErrorCounts:
    """Word errors of a set of transcripts; the `rate` of the counts is the WER.

    Args:
        references: one text per utterance.
        hypotheses: the same number of texts, in the same order.
        normalizer: applied to both; `normalizer("basic")` by default.
        language: ISO 639-1 code, for normalizers that take it.

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
    counts = (count_word_errors(align_words(apply(one, language), apply(other, language))) for one, other in pairs)
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


def count_character_errors(reference: str, hypothesis: str, has_spaces: bool = True) -> ErrorCounts:
    """Character errors between two normalized texts.

    A space between words is a character, unless the language is written without (`has_spaces` is False).
    """
    reference, hypothesis = reference.strip(), hypothesis.strip()
    if not has_spaces:
        reference, hypothesis = ("".join(text.split()) for text in (reference, hypothesis))
    if not reference or not hypothesis:
        return ErrorCounts(0, len(reference), len(hypothesis), len(reference))
    aligned = jiwer.process_characters(reference, hypothesis)
    return ErrorCounts(aligned.substitutions, aligned.deletions, aligned.insertions, len(reference))


def count_punctuation_errors(reference: str, hypothesis: str) -> ErrorCounts:
    """Errors of punctuation marks between two texts with punctuation.

    Words are aligned in lower case; then the marks behind a word are compared with those behind its counterpart. The
    `match_error_rate` of the sum is the punctuation error rate (PER) of Meister et al., "LibriSpeech-PC" (arXiv
    2310.02943), which align words and marks together.
    """
    if not any(map(_is_mark, reference + hypothesis)):
        return ErrorCounts()
    expected, guessed = _marks_behind_words(reference), _marks_behind_words(hypothesis)
    alignment = align_words(*(" ".join(word for word, _ in words[1:]) for words in (expected, guessed)))
    after, heard = iter(expected), iter(guessed)
    marks, others = next(after)[1], next(heard)[1]
    counts = ErrorCounts()
    for kind, _, _ in alignment:
        if kind in ("equal", "substitute"):
            counts += count_word_errors(align_words(" ".join(marks), " ".join(others)))
            marks = others = ()
        marks += next(after)[1] if kind != "insert" else ()
        others += next(heard)[1] if kind != "delete" else ()
    return counts + count_word_errors(align_words(" ".join(marks), " ".join(others)))


def _marks_behind_words(text: str) -> list[tuple[str, tuple[str, ...]]]:
    """The words in lower case, each with the marks behind it; first an empty one with those before all words.

    ASCII marks inside of words and numbers belong to them.
    """
    words: list[tuple[str, tuple[str, ...]]] = [("", ())]
    for written in text.lower().split():
        is_behind = True
        for place, character in enumerate(written):
            is_inside = 0 < place < len(written) - 1 and (written[place - 1] + written[place + 1]).isalnum()
            if _is_mark(character) and not (is_inside and character.isascii()):
                words[-1] = (words[-1][0], (*words[-1][1], character))
                is_behind = True
            elif is_behind:
                words.append((character, ()))
                is_behind = False
            else:
                words[-1] = (words[-1][0] + character, ())
    return words


def _is_mark(character: str) -> bool:
    return unicodedata.category(character)[0] == "P"
