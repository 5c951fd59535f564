"""What a run measured over its steps, as series of points."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from voxtral_dist.errors import UserError
from voxtral_dist.scoring.intervals import Interval
from voxtral_dist.scoring.results import TestSetResult
from voxtral_dist.training.metrics_file import read_metrics

Scores = Mapping[tuple[int, str], TestSetResult]


class Point(NamedTuple):
    """A value at a step, and its interval where there is one."""

    step: int
    value: float
    interval: Interval | None = None


@dataclass(frozen=True)
class Series:
    """Points in the order of their steps."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Curve:
    """What one chart shows.

    unit: of all values; empty where they have none. is_measured_rarely: so that each point is worth a mark.
    may_be_logarithmic: where values differ by orders of magnitude.
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


def curves_of(rows: Sequence[Mapping[str, Any]], scores: Scores) -> list[Curve]:
    """The curves of a run that have a point; rates are in percent, with their intervals where a score tells them."""
    training = [row for row in rows if row["kind"] == "train"]
    curves = [
        Curve(title, unit, (Series(title, _points(training, name)),), may_be_logarithmic=may_be_logarithmic)
        for name, title, unit, may_be_logarithmic in _TRAINING
    ]
    evaluations = [row for row in rows if row["kind"] == "evaluation"] or _rows_of(scores)
    curves += [_rates(evaluations, scores, *rate) for rate in _RATES]
    return [curve for curve in curves if any(series.points for series in curve.series)]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a run; none without the file.

    Raises:
        UserError: it cannot be read, or a line is no row.
    """
    try:
        rows = read_metrics(path)
    except OSError as error:
        raise UserError(f"The metrics {path} cannot be read: {error.strerror}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"The metrics {path} are damaged ({error}): mend or remove the line.") from error
    for number, row in enumerate(rows, 1):
        if not _is_row(row):
            raise UserError(f"The metrics {path} are damaged (line {number} is no row of a run): mend or remove it.")
    return rows


def _is_row(row: Any) -> bool:
    """Whether it has all that curves need, of the right types; a value that was not measured is null or missing."""
    if not isinstance(row, dict) or type(row.get("step")) is not int or not isinstance(row.get("kind"), str):
        return False
    if row["kind"] == "evaluation" and not isinstance(row.get("name"), str):
        return False
    drawn = [name for name, *_ in (*_TRAINING, *_RATES)]
    return all(isinstance(row.get(name), float | int | None) for name in drawn)


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[Point, ...]:
    found = (Point(row["step"], row[name]) for row in rows if row.get(name) is not None)
    return tuple(point for point in found if math.isfinite(point.value))


def _rates(
    evaluations: Sequence[Mapping[str, Any]], scores: Scores, name: str, title: str, interval: str | None
) -> Curve:
    """A rate of all test sets over the steps."""
    names = dict.fromkeys(row["name"] for row in evaluations)
    series = []
    for test_set in names:
        points = _points([row for row in evaluations if row["name"] == test_set], name)
        series.append(
            Series(test_set, tuple(_in_percent(one, scores.get((one.step, test_set)), interval) for one in points))
        )
    return Curve(title, "%", tuple(series), is_measured_rarely=True)


def _in_percent(point: Point, score: TestSetResult | None, interval: str | None) -> Point:
    ends = getattr(score.normalized, interval) if score is not None and interval is not None else None
    return Point(point.step, 100 * point.value, None if ends is None else (100 * ends[0], 100 * ends[1]))


def _rows_of(scores: Scores) -> list[dict[str, Any]]:
    """What the rows of metrics say, where only evaluations were kept."""
    rates = {key: score.normalized for key, score in scores.items()}
    return [{"step": step, "name": name, "wer": one.wer, "cer": one.cer} for (step, name), one in rates.items()]
