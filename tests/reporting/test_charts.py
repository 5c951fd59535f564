"""Curves lose no point, and axes place values according to their ticks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from voxtral_dist.errors import UserError
from voxtral_dist.reporting.charts import MAX_POINTS, Chart, draw, linear_axis, logarithmic_axis, thinned, tick_label
from voxtral_dist.reporting.curves import Curve, Point, Series, curves_of, read_rows
from voxtral_dist.reporting.results_folder import read_results, read_results_folder

from saved_results import NUM_STEPS, score_of


@pytest.fixture(scope="module")
def charts(run: Path) -> dict[str, Chart]:
    results = read_results_folder(run)
    return {curve.title: draw(curve) for curve in curves_of(results.rows, read_results(results))}


def places_of(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]


def test_a_curve_has_a_point_for_each_row(charts):
    assert {title: [len(places_of(line.path)) for line in chart.lines] for title, chart in charts.items()} == {
        "Training loss": [NUM_STEPS],
        "Learning rate": [NUM_STEPS],
        "Gradient norm": [NUM_STEPS - 1],  # One step was skipped.
        "WER": [3, 3],
        "CER": [3, 3],
    }
    loss = charts["Training loss"].lines[0]
    assert loss.steps.split() == [str(step) for step in range(1, NUM_STEPS + 1)]
    assert [float(value) for value in loss.values.split()] == [
        float(f"{2 / step:.5g}") for step in range(1, NUM_STEPS + 1)
    ]
    assert charts["Gradient norm"].lines[0].steps.split() == ["1", "2", "4", "5", "6", "7", "8"]


def test_rates_are_in_percent_with_the_intervals_of_their_scores(run, charts):
    line = charts["WER"].lines[0]
    assert line.name == "speech"
    for mark, step in zip(line.marks, (0, 4, 8), strict=True):
        score = score_of(run / "evaluations" / f"step-{step:07d}", "speech")
        low, high = (100 * end for end in score["wer_interval"])
        assert mark.label == f"speech, step {step}: {100 * score['wer']:.4g} % [{low:.4g}, {high:.4g}]"
        bottom, top = mark.interval
        assert bottom >= mark.y >= top, "low values stand below"
    assert charts["CER"].lines[0].marks[0].interval is None


def test_evaluations_without_metrics_have_curves_too(run, tmp_path):
    (tmp_path / "evaluations").symlink_to(run / "evaluations")
    results = read_results_folder(tmp_path)
    curves = curves_of(results.rows, read_results(results))
    assert [(curve.title, len(curve.series[0].points)) for curve in curves] == [("WER", 3), ("CER", 3)]


def test_values_that_are_not_finite_are_left_out_and_broken_rows_refused(tmp_path):
    rows = [{"kind": "train", "step": step, "loss": loss} for step, loss in ((1, 2.0), (2, float("nan")), (3, 1.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (curve,) = curves_of(read_rows(tmp_path / "metrics.jsonl"), {})
    assert [point.step for point in curve.series[0].points] == [1, 3]
    (tmp_path / "metrics.jsonl").write_text("no json\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl are damaged"):
        read_rows(tmp_path / "metrics.jsonl")


def test_long_runs_are_thinned_and_keep_their_spikes():
    points = [Point(step, 100.0 if step == 77_777 else float(step % 7)) for step in range(1, 123_457)]
    kept = thinned(points)
    assert MAX_POINTS / 2 < len(kept) <= MAX_POINTS
    assert [point.step for point in kept] == sorted({point.step for point in kept})
    assert Point(77_777, 100.0) in kept
    chart = draw(Curve("Loss", "", (Series("Loss", tuple(points)),)))
    assert chart.num_skipped == len(points) - len(kept)
    assert not chart.lines[0].marks
    assert thinned(points[:MAX_POINTS]) == tuple(points[:MAX_POINTS])


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 4.0, (0, 1, 2, 3, 4)),
        (0.21, 0.9, (0, 0.2, 0.4, 0.6, 0.8)),
        (2.06, 2.3, (2.1, 2.15, 2.2, 2.25, 2.3)),
        (0.0, 0.0, (0, 0.2, 0.4, 0.6, 0.8, 1.0)),
        (3.0, 3.0, (0, 1, 2, 3)),
        (-1.0, 1.0, (-1, -0.5, 0, 0.5, 1)),
        (1e-5, 2e-5, (1e-5, 1.2e-5, 1.4e-5, 1.6e-5, 1.8e-5, 2e-5)),
    ],
)
def test_linear_axes_end_where_the_data_end(low, high, ticks):
    axis = linear_axis(low, high, 100, 0)
    assert axis.ticks == pytest.approx(ticks)
    assert axis.high == (high or 1.0)
    assert axis.low in (low, 0.0)
    assert (axis.place(axis.low), axis.place(axis.high)) == (100, 0)
    assert axis.place((axis.low + axis.high) / 2) == 50


@pytest.mark.parametrize(
    ("last", "labels"),
    [
        (8, ["0", "2", "4", "6", "8"]),
        (8437, ["0", "2,500", "5,000", "8,437"]),
        (1000, ["0", "250", "500", "750", "1,000"]),
        (3, ["0", "1", "2", "3"]),
        (10_100, ["0", "5,000", "10,100"]),
    ],
)
def test_the_axis_of_steps_ends_at_the_last_step_and_says_which(last, labels):
    points = tuple(Point(step, 1.0) for step in (0, last))
    chart = draw(Curve("Loss", "", (Series("Loss", points),)))
    assert [tick.label for tick in chart.x_ticks] == labels
    assert chart.x_ticks[-1].place == chart.right
    assert places_of(chart.lines[0].path)[-1][0] == chart.right


@pytest.mark.parametrize(
    ("low", "high", "ends", "ticks"),
    [
        (3.0, 1200.0, (3, 1200), (10, 100, 1000)),
        (1.0, 100.0, (1, 100), (1, 2, 5, 10, 20, 50, 100)),
        (0.0007, 0.8, (0.0007, 0.8), (0.001, 0.01, 0.1)),
    ],
)
def test_logarithmic_axes_have_equal_ratios_at_equal_distances(low, high, ends, ticks):
    axis = logarithmic_axis(low, high, 100, 0)
    assert (axis.low, axis.high) == pytest.approx(ends)
    assert axis.ticks == pytest.approx(ticks)
    assert axis.place((axis.low * axis.high) ** 0.5) == 50
    assert axis.place(0.0) == 100, "what no logarithm can show stands at the end"


def test_values_that_rounding_alone_tells_apart_have_an_axis():
    for low, high in ((5.0, 5.0 + 1e-13), (0.0, 1e-13)):
        axis = linear_axis(low, high, 100.0, 0.0)
        assert axis.low < axis.high
        assert axis.place(low) == pytest.approx(axis.place(high))


def test_axes_are_logarithmic_only_where_it_is_needed_and_possible():
    def is_logarithmic(*values: float, may_be: bool = True) -> bool:
        points = tuple(Point(step, value) for step, value in enumerate(values))
        return draw(Curve("Loss", "", (Series("Loss", points),), may_be_logarithmic=may_be)).is_logarithmic

    assert is_logarithmic(700.0, 2.0)
    assert not is_logarithmic(7.0, 2.0)
    assert not is_logarithmic(700.0, 0.0)
    assert not is_logarithmic(700.0, 2.0, may_be=False)


def test_a_single_point_is_a_mark():
    (line,) = draw(Curve("Loss", "nats", (Series("Loss", (Point(5, 2.0),)),))).lines
    assert [mark.label for mark in line.marks] == ["Loss, step 5: 2 nats"]


@pytest.mark.parametrize(
    ("value", "label"), [(0, "0"), (20_000, "20,000"), (0.25, "0.25"), (2.5e-4, "2.5e-4"), (1e-5, "1e-5"), (2e6, "2e6")]
)
def test_ticks_are_short(value, label):
    assert tick_label(value) == label
