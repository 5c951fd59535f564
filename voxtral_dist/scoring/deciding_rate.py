"""Which error rate a test set is judged by: that of its words, or that of its characters."""

from __future__ import annotations

from collections.abc import Mapping

from voxtral_dist.config import ErrorRate

# What the errors of a rate are counted in.
ERROR_UNITS: Mapping[ErrorRate, str] = {"wer": "words", "cer": "characters"}


def other_rate(metric: ErrorRate) -> ErrorRate:
    """The rate that does not decide."""
    return "cer" if metric == "wer" else "wer"


def deciding_rate(num_without_spaces: int, num_utterances: int, configured: ErrorRate | None = None) -> ErrorRate:
    """The error rate that tells most about a test set.

    Args:
        num_without_spaces: references in languages without spaces between words.
        num_utterances: of the test set.
        configured: the rate by which the run selects checkpoints on this set; None where it doesn't.

    Returns:
        `cer` where it is configured, and where most references have no spaces between words, so that each is right or
        wrong as a whole; else `wer`.
    """
    return "cer" if configured == "cer" or 2 * num_without_spaces > num_utterances else "wer"
