"""From values to places on paper, and the ticks between."""

from __future__ import annotations

import math
from dataclasses import dataclass

_NUM_STEPS_BETWEEN_TICKS = (1.0, 2.0, 2.5, 5.0, 10.0)
# From here on small values of a linear axis cannot be told apart.
_MIN_LOGARITHMIC_RATIO = 50.0
_FEW_POWERS = 3


@dataclass(frozen=True)
class Axis:
    """Maps the values from `low` to `high` to the places from `start` to `end`; ticks are values."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    is_logarithmic: bool = False

    def place(self, value: float) -> float:
        """Where a value stands; what is beyond the ends stands at the end."""
        low, high, value = (
            math.log10(one) if self.is_logarithmic else one for one in (self.low, self.high, self._kept(value))
        )
        return round(self.start + (self.end - self.start) * (value - low) / (high - low), 2)

    def _kept(self, value: float) -> float:
        return min(max(value, self.low), self.high)


def linear_axis(low: float, high: float, start: float, end: float, num_ticks: int = 5) -> Axis:
    """An axis whose ends are ticks; it begins at 0 where that takes less than half of it."""
    if 0 < low < high / 2 or low == high > 0:
        low = 0.0
    # What rounding alone makes different is the same.
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-3):
        high = low + 1.0
    distance = tick_distance(high - low, num_ticks)
    first, last = math.floor(low / distance + 1e-9), math.ceil(high / distance - 1e-9)
    ticks = tuple(round(number * distance, 12) for number in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], start, end, ticks)


def tick_distance(span: float, num_ticks: int) -> float:
    """The smallest of 1, 2, 2.5 and 5 times a power of ten that needs no more ticks."""
    power = 10.0 ** math.floor(math.log10(span / num_ticks))
    return next(step * power for step in _NUM_STEPS_BETWEEN_TICKS if step * power >= span / num_ticks * (1 - 1e-9))


def logarithmic_axis(low: float, high: float, start: float, end: float) -> Axis:
    """An axis between 1, 2 or 5 times powers of ten; ticks at powers of ten, and at the others where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    first = max(step for step in steps if step <= low * (1 + 1e-9))
    last = min(step for step in steps if step >= high * (1 - 1e-9))
    factors = (1, 2, 5) if len(powers) <= _FEW_POWERS else (1,)
    ticks = [factor * 10.0**power for power in powers for factor in factors if first <= factor * 10.0**power <= last]
    return Axis(first, last, start, end, tuple(ticks), is_logarithmic=True)


def spans_decades(low: float, high: float) -> bool:
    """Whether a logarithmic axis is needed, and possible."""
    return low > 0 and high / low >= _MIN_LOGARITHMIC_RATIO


def tick_label(value: float) -> str:
    """Such as `2,000`, `0.25` or `2.5e-4`."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.6g}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
