"""How a test set compares with an earlier result of it: at the start of its run, or of a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from voxtral_dist.config import ErrorRate
from voxtral_dist.scoring.comparison import Pair, PairedComparison, compare_pairs
from voxtral_dist.scoring.grouping import Grouping
from voxtral_dist.scoring.intervals import Interval
from voxtral_dist.scoring.results import TestSetResult

# The level of significance that belongs to intervals of 95 %.
_MAX_P = 0.05

Judgement = Literal["better", "worse", "undecided"]


@dataclass(frozen=True)
class Outcome:
    """A result of a test set beside an earlier one of the same utterances.

    against: what the earlier result is of, such as `the start`. num_better, num_worse: utterances with fewer and with
    more errors than before.
    """

    against: str
    earlier: TestSetResult
    later: TestSetResult
    paired: PairedComparison
    num_better: int
    num_worse: int

    @property
    def metric(self) -> ErrorRate:
        """The error rate by which the results are compared."""
        return self.paired.metric

    @property
    def before(self) -> float | None:
        """The earlier rate."""
        return self.earlier.normalized.rate(self.metric)

    @property
    def after(self) -> float | None:
        """The later rate."""
        return self.later.normalized.rate(self.metric)

    @property
    def before_interval(self) -> Interval | None:
        """The 95 % interval of the earlier rate."""
        return self.earlier.normalized.interval(self.metric)

    @property
    def after_interval(self) -> Interval | None:
        """The 95 % interval of the later rate."""
        return self.later.normalized.interval(self.metric)

    @property
    def judgement(self) -> Judgement:
        """Whether the difference is significant by both measures.

        The 95 % interval of the paired difference excludes 0, and p of the matched pairs is below 0.05. Undecided with
        fewer utterances than that test needs, whose interval is too narrow as well.
        """
        interval, p_value = self.paired.difference_interval, self.paired.p_value
        if interval is None or p_value is None or p_value >= _MAX_P or interval[0] <= 0 <= interval[1]:
            return "undecided"
        return "better" if interval[1] < 0 else "worse"

    @property
    def said(self) -> str:
        """The judgement in words."""
        if self.judgement != "undecided":
            return f"significantly {self.judgement}"
        is_small = self.paired.difference_interval is None or self.paired.p_value is None
        return "too few utterances to be certain" if is_small else "no significant difference"


def outcome_of(
    against: str,
    results: tuple[TestSetResult, TestSetResult],
    pairs: Sequence[Pair],
    grouping: Grouping,
    metric: ErrorRate,
) -> Outcome:
    """Compare an earlier and a later result.

    Args:
        against: what the earlier result is of.
        results: the earlier and the later one.
        pairs: their utterances, the earlier first.
        grouping: names the field of the speaker.
        metric: the error rate by which they are compared.
    """
    earlier, later = results
    changes = [after.counts(metric).errors - before.counts(metric).errors for before, after in pairs]
    return Outcome(
        against=against,
        earlier=earlier,
        later=later,
        paired=compare_pairs(pairs, grouping, metric),
        num_better=sum(change < 0 for change in changes),
        num_worse=sum(change > 0 for change in changes),
    )


def summary_of(outcomes: Sequence[Outcome]) -> str:
    """One sentence about all test sets that were compared with the same earlier result; empty without any."""
    if not outcomes:
        return ""
    against = outcomes[0].against
    if len(outcomes) == 1:
        (only,) = outcomes
        return {
            "better": f"Better than {against}.",
            "worse": f"Worse than {against}.",
            "undecided": f"Not known to be better or worse than {against}: {only.said}.",
        }[only.judgement]
    counts = {
        "better than": [one.judgement for one in outcomes].count("better"),
        "worse than": [one.judgement for one in outcomes].count("worse"),
        "not certainly different from": [one.judgement for one in outcomes].count("undecided"),
    }
    said = ", ".join(f"{what} {against} on {count}" for what, count in counts.items() if count)
    return f"{said[0].upper()}{said[1:]} of {len(outcomes)} test sets."
