"""Word alignment of a reference and a hypothesis, from which all word errors are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal, NamedTuple

import jiwer

EditKind = Literal["equal", "substitute", "delete", "insert"]


class AlignedWord(NamedTuple):
    """One step of an alignment. An inserted word has no reference, a deleted word no hypothesis."""

    kind: EditKind
    reference: str | None
    hypothesis: str | None


Alignment = tuple[AlignedWord, ...]


def align_words(reference: str, hypothesis: str) -> Alignment:
    """Align the words of two normalized texts at the smallest edit distance.

    Substitutions, deletions and insertions cost 1 each (Levenshtein); jiwer chooses among alignments of equal cost. An
    empty hypothesis deletes every word of its reference.
    """
    words, guessed = reference.split(), hypothesis.split()
    # jiwer rejects an empty reference; neither case needs an alignment.
    if not words or not guessed:
        deleted = (AlignedWord("delete", word, None) for word in words)
        return (*deleted, *(AlignedWord("insert", None, word) for word in guessed))
    chunks = jiwer.process_words(" ".join(words), " ".join(guessed)).alignments[0]
    return tuple(
        AlignedWord(chunk.type, *pair)
        for chunk in chunks
        for pair in zip_longest(
            words[chunk.ref_start_idx : chunk.ref_end_idx], guessed[chunk.hyp_start_idx : chunk.hyp_end_idx]
        )
    )


@dataclass(frozen=True)
class Confusion:
    """A word edit and its number of occurrences."""

    kind: EditKind
    reference: str | None
    hypothesis: str | None
    count: int


def most_frequent_confusions(alignments: Iterable[Alignment], num_each: int = 20) -> dict[EditKind, list[Confusion]]:
    """The `num_each` most frequent substitutions, deletions and insertions of a set.

    Confusions of equal count are in alphabetical order.
    """
    counts = Counter(word for alignment in alignments for word in alignment if word.kind != "equal")
    ranked = sorted(counts.items(), key=lambda one: (-one[1], one[0].reference or "", one[0].hypothesis or ""))
    confusions = [Confusion(*word, count) for word, count in ranked]
    kinds: tuple[EditKind, ...] = ("substitute", "delete", "insert")
    return {kind: [one for one in confusions if one.kind == kind][:num_each] for kind in kinds}
