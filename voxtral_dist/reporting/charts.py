"""Charts as geometry: where ticks, lines and marks stand. The template draws them as SVG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from voxtral_dist.reporting.axes import Axis, linear_axis, logarithmic_axis, spans_decades, tick_label
from voxtral_dist.reporting.curves import Curve, Point, Series

# In units of the drawing, which are pixels at its natural size: that of a phone.
WIDTH, HEIGHT = 360, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 350, 10, 172
# About three a pixel: more cannot be seen, and make files of long runs heavy.
MAX_POINTS = 1000
NUM_COLOURS = 6
# Shapes around (0, 0), so that lines are told apart without colours too.
MARKERS = (
    "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0",
    "M-3 -3h6v6h-6z",
    "M0 -4L4 3H-4z",
    "M0 -4.5L4.5 0L0 4.5L-4.5 0z",
)


@dataclass(frozen=True)
class Tick:
    """A place on an axis and what stands there."""

    place: float
    label: str


@dataclass(frozen=True)
class Mark:
    """A point with the ends of its interval, and what it says."""

    x: float
    y: float
    interval: tuple[float, float] | None
    label: str


@dataclass(frozen=True)
class Line:
    """A series on paper.

    path: of SVG. steps, values: of its points, which the page reads aloud under the pointer; places: their x. marks:
    none where there are too many points.
    """

    name: str
    number: int
    path: str
    places: str
    steps: str
    values: str
    marks: tuple[Mark, ...]

    @property
    def colour(self) -> int:
        """The number of its colour and its dashes."""
        return self.number % NUM_COLOURS

    @property
    def marker(self) -> str:
        """Its shape."""
        return MARKERS[self.number % len(MARKERS)]


@dataclass(frozen=True)
class Chart:
    """All that is drawn. summary: what it shows, for those who do not see it."""

    title: str
    unit: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    summary: str
    is_logarithmic: bool
    num_skipped: int

    width, height, left, right, top, bottom = WIDTH, HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM


def draw(curve: Curve) -> Chart:
    """The chart of a curve that has points."""
    points = [point for series in curve.series for point in series.points]
    x_axis = linear_axis(min(point.step for point in points), max(point.step for point in points), _LEFT, _RIGHT, 4)
    y_axis = _y_axis(curve, points)
    shown = [Series(series.name, thinned(series.points)) for series in curve.series]
    return Chart(
        title=curve.title,
        unit=curve.unit,
        x_ticks=_ticks(x_axis),
        y_ticks=_ticks(y_axis),
        lines=tuple(_line(number, series, curve, x_axis, y_axis) for number, series in enumerate(shown)),
        summary=_summary(curve),
        is_logarithmic=y_axis.is_logarithmic,
        num_skipped=len(points) - sum(len(series.points) for series in shown),
    )


def thinned(points: Sequence[Point]) -> tuple[Point, ...]:
    """At most `MAX_POINTS` of them: the lowest and the highest of each run of neighbours, so that spikes stay."""
    if len(points) <= MAX_POINTS:
        return tuple(points)
    run_length = -(-2 * len(points) // MAX_POINTS)
    return tuple(_extremes([points[start : start + run_length] for start in range(0, len(points), run_length)]))


def _extremes(runs: Sequence[Sequence[Point]]) -> Iterator[Point]:
    for run in runs:
        ends = {min(run, key=lambda point: point.value), max(run, key=lambda point: point.value)}
        yield from sorted(ends)


def _y_axis(curve: Curve, points: Sequence[Point]) -> Axis:
    values = [point.value for point in points]
    values += [end for point in points if point.interval for end in point.interval]
    low, high = min(values), max(values)
    if curve.may_be_logarithmic and spans_decades(low, high):
        return logarithmic_axis(low, high, _BOTTOM, _TOP)
    return linear_axis(low, high, _BOTTOM, _TOP)


def _ticks(axis: Axis) -> tuple[Tick, ...]:
    return tuple(Tick(axis.place(value), tick_label(value)) for value in axis.ticks)


def _line(number: int, series: Series, curve: Curve, x_axis: Axis, y_axis: Axis) -> Line:
    places = [(x_axis.place(point.step), y_axis.place(point.value)) for point in series.points]
    marks = zip(series.points, places, strict=True) if curve.is_measured_rarely or len(places) == 1 else ()
    return Line(
        name=series.name,
        number=number,
        path="".join(f"{'L' if number else 'M'}{x:g} {y:g}" for number, (x, y) in enumerate(places)),
        places=" ".join(f"{x:g}" for x, _ in places),
        steps=" ".join(str(point.step) for point in series.points),
        values=" ".join(f"{point.value:.5g}" for point in series.points),
        marks=tuple(_mark(point, place, series.name, curve, y_axis) for point, place in marks),
    )


def _mark(point: Point, place: tuple[float, float], name: str, curve: Curve, y_axis: Axis) -> Mark:
    label = f"{name}, step {point.step:,}: {point.value:.4g} {curve.unit}".rstrip()
    if point.interval is None:
        return Mark(*place, None, label)
    low, high = point.interval
    return Mark(*place, (y_axis.place(low), y_axis.place(high)), f"{label} [{low:.4g}, {high:.4g}]")


def _summary(curve: Curve) -> str:
    parts = [
        f"{series.name} from {series.points[0].value:.4g} at step {series.points[0].step:,} to "
        f"{series.points[-1].value:.4g} at step {series.points[-1].step:,}"
        for series in curve.series
        if series.points
    ]
    return f"{curve.title}{f', {curve.unit}' if curve.unit else ''}, over steps: {'; '.join(parts)}."
