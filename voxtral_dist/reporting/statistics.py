"""Figures as text, alike in both forms of a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from voxtral_dist.scoring.results import TestSetScore, percent


@dataclass(frozen=True)
class Column:
    """What else was counted of a test set, and its text."""

    title: str
    value: Callable[[TestSetScore], float | int | None]
    form: Callable[[float], str]

    def text(self, score: TestSetScore) -> str:
        """Nothing where it was not measured."""
        value = self.value(score)
        return "" if value is None else self.form(value)


_COLUMNS = (
    Column("orthographic CER", lambda score: score.orthographic.cer, percent),
    Column("empty hypotheses", lambda score: score.num_empty_hypotheses, str),
    Column("empty references", lambda score: score.num_empty_references, str),
    Column("token limit hit", lambda score: score.num_limit_hits, str),
    Column("repetition loops", lambda score: score.num_repetition_loops, str),
    Column("language right", lambda score: getattr(score.language_identification, "accuracy", None), percent),
    Column("B-WER", lambda score: getattr(score.biased, "biased_wer", None), percent),
    Column("U-WER", lambda score: getattr(score.biased, "unbiased_wer", None), percent),
    Column("RTFx", lambda score: score.rtfx, "{:.1f}".format),
    Column("loss", lambda score: score.loss, "{:.4f}".format),
    Column("perplexity", lambda score: score.perplexity, "{:.4g}".format),
)


def other_columns(scores: Sequence[TestSetScore]) -> list[Column]:
    """Those that some test set has."""
    return [column for column in _COLUMNS if any(column.value(score) is not None for score in scores)]


def points(difference: float | None) -> str:
    """A difference of rates in points, with its sign."""
    return "n/a" if difference is None else f"{100 * difference:+.2f} points"
