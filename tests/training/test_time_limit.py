"""When a run with a time limit stops: by a clock that tests set."""

from __future__ import annotations

from typing import Any

import pytest

from voxtral_dist.training.time_limit import TimeLimit


class Clock:
    """A clock in seconds that moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now


def limit_of(hours: float | None, **seconds: float) -> tuple[TimeLimit, Clock]:
    clock = Clock()
    limit = TimeLimit(hours, clock)
    for part in seconds:
        limit.record(part, seconds[part])  # type: ignore[arg-type]
    return limit, clock


def test_parts_are_expected_to_take_a_quarter_longer_than_the_longest_of_the_last() -> None:
    limit, clock = limit_of(1.0, save=400.0)
    for seconds in (1000.0, 5.0):
        limit.record("step", seconds)
    needed = 1.25 * (1000 + 400)
    clock.now += 3600 - needed
    assert not limit.is_too_short_for("step", "save")
    clock.now += 1
    assert limit.is_too_short_for("step", "save")
    assert not limit.is_too_short_for("save")
    for _ in range(20):
        limit.record("step", 5.0)
    assert not limit.is_too_short_for("step", "save"), "the first step, which compiles, is forgotten"


def test_what_was_never_measured_is_expected_to_take_no_time() -> None:
    limit, clock = limit_of(1.0)
    clock.now += 3599
    assert not limit.is_too_short_for("step", "save", "evaluation")
    clock.now += 2
    assert limit.is_too_short_for()


@pytest.mark.parametrize("seconds", [{}, {"save": 1e9, "step": 1e9}])
def test_no_limit_is_never_too_short(seconds: dict[str, float]) -> None:
    limit, clock = limit_of(None, **seconds)
    clock.now += 1e12
    assert not limit.is_too_short_for("step", "save")
    assert not limit.needs_a_save()


def test_a_save_is_measured_in_half_of_the_time() -> None:
    limit, clock = limit_of(2.0)
    clock.now += 3599
    assert not limit.needs_a_save()
    clock.now += 1
    assert limit.needs_a_save()
    with limit.measuring("save"):
        clock.now += 60
    assert limit.last("save") == 60
    assert not limit.needs_a_save()


def test_a_resumed_run_knows_how_long_its_parts_took() -> None:
    limit, clock = limit_of(1.0)
    checkpoints: list[dict[str, Any]] = [{"step": 3}, {"step": 6, "seconds": 100.0}, {"step": 9, "seconds": 80.0}]
    # Two test sets, and rows of an older version.
    evaluations: list[dict[str, Any]] = [{"step": 0}, {"step": 6, "seconds": 200.0}, {"step": 6, "seconds": 120.0}]
    uploads: list[dict[str, Any]] = [
        {"event": "uploaded", "step": 3, "seconds": 300.0},
        {"event": "uploaded", "step": 9, "seconds": 240.0},
    ]
    limit.remember(checkpoints, evaluations, uploads)
    assert limit.last("upload") == 240
    clock.now += 3600 - 1.25 * (100 + 300)
    assert not limit.is_too_short_for("save", "upload")
    assert limit.is_too_short_for("save", "upload", "upload")
    clock.now += 1.25 * 300
    assert not limit.is_too_short_for("save")
    clock.now -= 1.25 * 320
    assert not limit.is_too_short_for("evaluation", "save")
    clock.now += 1
    assert limit.is_too_short_for("evaluation", "save")
