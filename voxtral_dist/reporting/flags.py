"""Red flags: what a reader of a report has to know before its rates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from voxtral_dist.config import ErrorRate
from voxtral_dist.reporting.curves import Results
from voxtral_dist.reporting.outcomes import Outcome
from voxtral_dist.reporting.results_folder import ResultsFolder
from voxtral_dist.scoring.deciding_rate import ERROR_UNITS
from voxtral_dist.scoring.results import TestSetResult, percent


def flags_of_set(result: TestSetResult, metric: ErrorRate, outcomes: tuple[Outcome, ...]) -> Iterator[str]:
    """What is wrong with the hypotheses of a test set; counts of earlier results stand beside its own."""
    earlier = outcomes[0] if outcomes else None
    for outcome in outcomes:
        if outcome.judgement == "worse":
            yield f"worse than {outcome.against}"
    counts = {
        "repetition loops": lambda one: one.num_repetition_loops,
        "hypotheses cut at the token limit": lambda one: one.num_limit_hits,
        "empty hypotheses": lambda one: one.num_empty_hypotheses,
        "languages detected wrong": _num_wrong_languages,
    }
    for what, count in counts.items():
        if number := count(result):
            total = _num_asked(result) if what.startswith("languages") else result.normalized.num_utterances
            before = "" if earlier is None else f", {count(earlier.earlier) or 0:,} {_at(earlier.against)}"
            yield f"{what}: {number:,} of {total:,} ({percent(number / total)}){before}"
    rate = result.normalized.rate(metric)
    if rate is not None and rate > 1:
        yield f"more errors than {ERROR_UNITS[metric]}"


def flags_of_run(summary: Mapping[str, Any], folder: ResultsFolder, results: Results) -> Iterator[str]:
    """What is wrong with a run as a whole.

    Args:
        summary: of a finished run; empty without one.
        folder: the run, and the step whose results are shown.
        results: of all evaluated steps, by step and test set.
    """
    counted = {
        "num_bad_utterances": "bad utterances left out while training",
        "num_too_long": "utterances too long for the model left out while training",
        "num_skipped_updates": "updates skipped, because their loss or gradient was out of bounds",
    }
    for key, what in counted.items():
        number = summary.get(key)
        if isinstance(number, int) and number > 0:
            yield f"{what}: {number:,}"
    yield from _better_step(folder, results)


def _better_step(folder: ResultsFolder, results: Results) -> Iterator[str]:
    """The step with the lowest rate of the first test set, if it is not the shown one."""
    shown = folder.step
    name = next((name for step, name in results if step == shown), None)
    if name is None or shown is None:
        return
    metric = folder.metric(name, results[shown, name])
    rates = {step: one.normalized.rate(metric) for (step, other), one in results.items() if other == name}
    known = {step: rate for step, rate in rates.items() if rate is not None}
    best = min(known, key=lambda step: (known[step], step), default=shown)
    if shown in known and known[best] < known[shown]:
        yield (
            f"step {best:,} has a lower {metric.upper()} on {name} than the step shown: {percent(known[best])} instead "
            f"of {percent(known[shown])}"
        )


def _num_wrong_languages(result: TestSetResult) -> int:
    found = result.language_identification
    return 0 if found is None else found.num_utterances - found.num_correct


def _num_asked(result: TestSetResult) -> int:
    assert result.language_identification is not None
    return result.language_identification.num_utterances


def _at(against: str) -> str:
    return f"at {against}" if against == "the start" else f"in {against}"
