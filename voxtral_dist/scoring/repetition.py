"""Repetition loops: hypotheses that repeat the same words over and over."""

from __future__ import annotations

from collections.abc import Sequence

from voxtral_dist.text.steps import fold

MAX_LOOP_WORDS = 6
MIN_REPETITIONS = 4
MIN_COVERED_WORDS = 8


def has_repetition_loop(hypothesis: str, reference: str) -> bool:
    """Whether a hypothesis has a loop and its reference has none; case and punctuation don't matter.

    A loop is a sequence of 1 to `MAX_LOOP_WORDS` words, repeated at least `MIN_REPETITIONS` times in a row and covering
    at least `MIN_COVERED_WORDS` words. A text without spaces is one word, so no loop is found in it.
    """
    return _has_loop(fold(hypothesis).split()) and not _has_loop(fold(reference).split())


def _has_loop(words: Sequence[str]) -> bool:
    return any(
        _longest_periodic(words, period) >= max(MIN_REPETITIONS * period, MIN_COVERED_WORDS)
        for period in range(1, MAX_LOOP_WORDS + 1)
    )


def _longest_periodic(words: Sequence[str], period: int) -> int:
    """Length of the longest run in which each word equals the one `period` words before it; 0 where none repeats."""
    longest = run = 0
    for place in range(period, len(words)):
        run = run + 1 if words[place] == words[place - period] else 0
        longest = max(longest, run)
    return longest + period if longest else 0
