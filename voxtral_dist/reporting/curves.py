"""Metrics of a run over its steps, as series of points."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from voxtral_dist.errors import UserError
from voxtral_dist.scoring.intervals import Interval
from voxtral_dist.scoring.results import TestSetResult
from voxtral_dist.training.metrics_file import split_metrics

Results = Mapping[tuple[int, str], TestSetResult]


class Point(NamedTuple):
    """A value at a step, with its confidence interval if known."""

    step: int
    value: float
    interval: Interval | None = None


@dataclass(frozen=True)
class Series:
    """Named points in the order of their steps."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Curve:
    """The series of one chart.

    unit: of all values; empty without one. is_measured_rarely: whether each point gets a mark. may_be_logarithmic:
    whether the axis becomes logarithmic if values differ by orders of magnitude.
    """

    title: str
    unit: str
    series: tuple[Series, ...]
    is_measured_rarely: bool = False
    may_be_logarithmic: bool = True


_TRAINING = (
    ("loss", "Training loss", "nats per target token", True),
    ("learning_rate", "Learning rate", "", False),
    ("grad_norm", "Gradient norm", "", True),
)
_RATES = (("wer", "WER", "wer_interval"), ("cer", "CER", None))


def curves_of(rows: Sequence[Mapping[str, Any]], results: Results) -> list[Curve]:
    """The curves of a run that have points; rates are in percent, with the intervals of the results."""
    training = [row for row in rows if row["kind"] == "train"]
    curves = [
        Curve(title, unit, (Series(title, _points(training, name)),), may_be_logarithmic=may_be_logarithmic)
        for name, title, unit, may_be_logarithmic in _TRAINING
    ]
    evaluations = [row for row in rows if row["kind"] == "evaluation"] or _rows_of(results)
    curves += [_rates(evaluations, results, *rate) for rate in _RATES]
    return [curve for curve in curves if any(series.points for series in curve.series)]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`; none without the file.

    Raises:
        UserError: the file cannot be read, or a line is not a row.
    """
    try:
        metrics = split_metrics(path)
    except OSError as error:
        raise UserError(f"The metrics {path} cannot be read: {error.strerror}.") from error
    number = next(iter(metrics.damaged), None)
    if number is None:
        number = next((number for number, row in enumerate(metrics.rows, 1) if not _is_drawable(row)), None)
    if number is not None:
        raise UserError(f"The metrics {path} are damaged (line {number} is not a row of a run): fix or remove it.")
    return metrics.rows


def _is_drawable(row: Mapping[str, Any]) -> bool:
    """Whether what curves draw has the right types; values that were not measured are null or missing."""
    drawn = [name for name, *_ in (*_TRAINING, *_RATES)]
    return all(isinstance(row.get(name), float | int | None) for name in drawn)


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[Point, ...]:
    found = (Point(row["step"], row[name]) for row in rows if row.get(name) is not None)
    return tuple(point for point in found if math.isfinite(point.value))


def _rates(
    evaluations: Sequence[Mapping[str, Any]], results: Results, name: str, title: str, interval: str | None
) -> Curve:
    """The curve of a rate, with a series for each test set."""
    names = dict.fromkeys(row["name"] for row in evaluations)
    series = []
    for test_set in names:
        points = _points([row for row in evaluations if row["name"] == test_set], name)
        series.append(
            Series(test_set, tuple(_in_percent(one, results.get((one.step, test_set)), interval) for one in points))
        )
    return Curve(title, "%", tuple(series), is_measured_rarely=True)


def _in_percent(point: Point, result: TestSetResult | None, interval: str | None) -> Point:
    ends = getattr(result.normalized, interval) if result is not None and interval is not None else None
    return Point(point.step, 100 * point.value, None if ends is None else (100 * ends[0], 100 * ends[1]))


def _rows_of(results: Results) -> list[dict[str, Any]]:
    """Rows as in `metrics.jsonl`, for runs of which only the evaluations were kept."""
    rates = {key: result.normalized for key, result in results.items()}
    return [{"step": step, "name": name, "wer": one.wer, "cer": one.cer} for (step, name), one in rates.items()]
