"""Charts as geometry: axes, ticks, lines and marks. The template draws them as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from voxtral_dist.reporting.curves import Curve, Point, Series

_NUM_STEPS_BETWEEN_TICKS = (1.0, 2.0, 2.5, 5.0, 10.0)
# At a larger ratio, small values on a linear axis are too close to read.
_MIN_LOGARITHMIC_RATIO = 50.0
_FEW_POWERS = 3


@dataclass(frozen=True)
class Axis:
    """Maps values from `low` to `high` to coordinates from `start` to `end`; ticks are values."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    is_logarithmic: bool = False

    def place(self, value: float) -> float:
        """The coordinate of a value, which is clamped to the axis."""
        low, high, value = (
            math.log10(one) if self.is_logarithmic else one for one in (self.low, self.high, self._kept(value))
        )
        return round(self.start + (self.end - self.start) * (value - low) / (high - low), 2)

    def _kept(self, value: float) -> float:
        return min(max(value, self.low), self.high)


def linear_axis(low: float, high: float, start: float, end: float, num_ticks: int = 5) -> Axis:
    """An axis that ends where its values end; it begins at 0 if less than half of it is empty then."""
    if 0 < low < high / 2 or low == high > 0:
        low = 0.0
    # Values that differ only by rounding are the same.
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-3):
        high = low + 1.0
    distance = tick_distance(high - low, num_ticks)
    first, last = math.ceil(low / distance - 1e-9), math.floor(high / distance + 1e-9)
    ticks = tuple(round(number * distance, 12) for number in range(first, last + 1))
    return Axis(low, high, start, end, ticks)


def tick_distance(span: float, num_ticks: int) -> float:
    """The smallest of 1, 2, 2.5 and 5 times a power of ten that makes at most `num_ticks` steps."""
    power = 10.0 ** math.floor(math.log10(span / num_ticks))
    return next(step * power for step in _NUM_STEPS_BETWEEN_TICKS if step * power >= span / num_ticks * (1 - 1e-9))


def logarithmic_axis(low: float, high: float, start: float, end: float) -> Axis:
    """A logarithmic axis that ends where its values end; ticks at powers of ten, and between them if these are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= _FEW_POWERS else (1,)
    steps = [factor * 10.0**power for power in powers for factor in factors]
    ticks = tuple(step for step in steps if low * (1 - 1e-9) <= step <= high * (1 + 1e-9))
    return Axis(low, high, start, end, ticks, is_logarithmic=True)


def spans_decades(low: float, high: float) -> bool:
    """Whether a logarithmic axis is needed and possible."""
    return low > 0 and high / low >= _MIN_LOGARITHMIC_RATIO


def tick_label(value: float) -> str:
    """A short label such as `2,000`, `0.25` or `2.5e-4`."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.6g}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


# In units of the drawing, which are pixels at its natural size, that of a phone.
WIDTH, HEIGHT = 360, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 350, 10, 172
# About three per pixel: more are invisible, and make the files of long runs large.
MAX_POINTS = 1000
NUM_COLOURS = 6
# Shapes around (0, 0), so that lines differ without colours too.
MARKERS = (
    "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0",
    "M-3 -3h6v6h-6z",
    "M0 -4L4 3H-4z",
    "M0 -4.5L4.5 0L0 4.5L-4.5 0z",
)


@dataclass(frozen=True)
class Tick:
    """A coordinate on an axis and its label."""

    place: float
    label: str


@dataclass(frozen=True)
class Mark:
    """A point with the ends of its interval and its tooltip."""

    x: float
    y: float
    interval: tuple[float, float] | None
    label: str


@dataclass(frozen=True)
class Line:
    """A drawn series.

    path: of SVG. places: x coordinates of its points. steps, values: of its points, which the script shows under the
    pointer. marks: none if there are too many points.
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
        """The number of the colour and dash pattern."""
        return self.number % NUM_COLOURS

    @property
    def marker(self) -> str:
        """The path of the marker."""
        return MARKERS[self.number % len(MARKERS)]


@dataclass(frozen=True)
class Chart:
    """The geometry of a chart. summary: its text for screen readers. num_skipped: points that are not drawn."""

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
    """Draw a curve that has points."""
    points = [point for series in curve.series for point in series.points]
    x_axis = _step_axis(min(point.step for point in points), max(point.step for point in points))
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
    """Thin points to `MAX_POINTS`: the lowest and highest of each group of neighbours, so that spikes stay."""
    if len(points) <= MAX_POINTS:
        return tuple(points)
    group_length = -(-2 * len(points) // MAX_POINTS)
    return tuple(_extremes([points[start : start + group_length] for start in range(0, len(points), group_length)]))


def _extremes(groups: Sequence[Sequence[Point]]) -> Iterator[Point]:
    for group in groups:
        ends = {min(group, key=lambda point: point.value), max(group, key=lambda point: point.value)}
        yield from sorted(ends)


def _step_axis(first: int, last: int) -> Axis:
    """The axis of steps; its last tick is the last step, in place of a regular one that is too close to it."""
    axis = linear_axis(first, last, _LEFT, _RIGHT, 4)
    room = (axis.high - axis.low) / 8
    whole = (tick for tick in axis.ticks if tick == int(tick) and tick <= axis.high - room)
    return replace(axis, ticks=(*whole, axis.high))


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
