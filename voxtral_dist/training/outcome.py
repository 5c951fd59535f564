"""What a run has come to: its error rates before and after, and what it has left on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from voxtral_dist.config import ErrorRate
from voxtral_dist.scoring.deciding_rate import deciding_rate
from voxtral_dist.training.selection import Verdict

_Row = Mapping[str, Any]
# What people look for first; the summary is named by the line that follows.
_RESULTS = {"report": "report.html", "adapter": "adapter"}


def outcome_lines(rows: Sequence[_Row], verdict: Verdict, exported_step: int, run_dir: Path) -> Iterator[str]:
    """The result of a finished run.

    Args:
        rows: of kind `evaluation`.
        verdict: which checkpoint was selected, if any.
        exported_step: the step whose weights were exported.
        run_dir: where report and adapters are named, if they are there.
    """
    names = dict.fromkeys(row["name"] for row in rows)
    rates = [line for name in names for line in _change(name, rows, exported_step, verdict)]
    there = [f"{what} {run_dir / name}" for what, name in _RESULTS.items() if (run_dir / name).exists()]
    if rates or there:
        yield f"Result of step {exported_step}: " + ", ".join([*rates, *there])
    if worse := _worse_than_start(rows, verdict):
        yield worse


def telling_rate(row: _Row, configured: ErrorRate | None = None) -> ErrorRate:
    """The error rate by which a row of kind `evaluation` is told in one number; see `deciding_rate`."""
    return deciding_rate(row.get("num_without_spaces", 0), row.get("num_utterances", 0), configured)


def _change(name: str, rows: Sequence[_Row], step: int, verdict: Verdict) -> Iterator[str]:
    """The error rate of a test set at a step, after that of the start where it was measured."""
    of_set = [row for row in rows if row["name"] == name]
    after = next((row for row in reversed(of_set) if row["step"] <= step), None)
    if after is None:
        return
    metric = telling_rate(after, verdict.metric if name == verdict.test_set else None)
    found = after.get(metric)
    start = next((row.get(metric) for row in of_set if row["step"] == 0 and step > 0), None)
    if found is None:
        return
    head = f"{name} {metric.upper()}"
    yield f"{head} {_percent(found)} %" if start is None else f"{head} {_compared(start, found)}"


def _compared(before: float, after: float) -> str:
    if after == before:
        return f"{_percent(after)} % (as at the start)"
    verdict = "worse than the start" if after > before else f"{100 * (before - after):.1f} points better"
    return f"{_percent(before)} -> {_percent(after)} % ({verdict})"


def _worse_than_start(rows: Sequence[_Row], verdict: Verdict) -> str | None:
    """A sentence where the best checkpoint is worse than the model that the run began with."""
    starts = [row for row in rows if row["step"] == 0 and row["name"] == verdict.test_set]
    start = starts[-1].get(verdict.metric) if starts else None
    if verdict.best_rate is None or start is None or verdict.best_rate <= start:
        return None
    rate = verdict.metric.upper()
    return (
        f"The best checkpoint, of step {verdict.best_step}, is worse than the model that the run began with: "
        f"{rate} {_percent(verdict.best_rate)} % instead of {_percent(start)} % on `{verdict.test_set}`. Use that "
        "model, and try a lower `optimizer.learning_rate`, more data or fewer steps."
    )


def _percent(rate: float) -> str:
    return f"{100 * rate:.2f}"
