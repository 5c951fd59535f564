"""The best checkpoint, the early end of a run, and the limit of the guard set."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from voxtral_dist.config import EvaluationConfig, GuardConfig, SelectionConfig
from voxtral_dist.errors import UserError
from voxtral_dist.training.selection import judge, refuse_guard_without_start

EVERY = 10
# All steps that these runs evaluate.
SAVED = range(0, 1000, EVERY)


def rows(**curves: list[float | None]) -> list[dict[str, Any]]:
    """Rows of metrics: the WER of each set at the start and after every ten steps."""
    return [
        {"step": EVERY * number, "name": name, "wer": wer}
        for name, curve in curves.items()
        for number, wer in enumerate(curve)
    ]


def selection(**settings: Any) -> SelectionConfig:
    return SelectionConfig(test_set="dev", **settings)


def test_the_smallest_wer_is_the_best_and_the_earliest_of_equals() -> None:
    verdict = judge(selection(), rows(dev=[0.1, 0.5, 0.3, 0.4, 0.3]), SAVED)
    assert (verdict.best_step, verdict.best_wer) == (20, 0.3), "the untrained model is no candidate"
    assert not verdict.must_stop
    assert verdict.messages == ()


def test_before_the_first_evaluation_there_is_no_best() -> None:
    assert judge(selection(), [], SAVED).best_step is None
    assert judge(selection(), rows(dev=[0.9]), SAVED).best_step is None


def test_an_evaluation_that_was_repeated_counts_once() -> None:
    found = [*rows(dev=[0.9, 0.5]), {"step": 10, "name": "dev", "wer": 0.7}, *rows(other=[0.1, 0.1])]
    assert judge(selection(), found, SAVED).best_wer == 0.7


@pytest.mark.parametrize(
    ("curve", "must_stop"),
    [
        ([0.9, 0.5, 0.4, 0.41], False),
        ([0.9, 0.5, 0.4, 0.41, 0.42], True),
        ([0.9, 0.5, 0.4, 0.41, 0.39], False),
        # Small steps down are no improvement each, and none together.
        ([0.9, 0.5, 0.4, 0.398, 0.396], True),
    ],
)
def test_patience_counts_evaluations_without_improvement(curve: list[float | None], must_stop: bool) -> None:
    verdict = judge(selection(patience=2, min_improvement=0.005), rows(dev=curve), SAVED)
    assert verdict.must_stop == must_stop
    assert len(verdict.messages) == must_stop


def test_a_checkpoint_that_breaks_the_guard_is_not_the_best() -> None:
    guard = {"test_set": "general", "max_wer_increase": 0.02}
    found = rows(dev=[0.9, 0.5, 0.4, 0.3], general=[0.1, 0.11, 0.12, 0.13])
    verdict = judge(selection(guard=guard), found, SAVED)
    assert verdict.best_step == 20
    assert not verdict.must_stop
    assert "`general` is 3.00 points above that of the start, more than 2" in verdict.messages[0]


def test_limits_are_what_they_say_whatever_floats_make_of_them() -> None:
    # 0.31 - 0.3 is a little more than 0.01, and 0.21 - 0.2 a little less.
    for start in (0.2, 0.3):
        guard = {"test_set": "general", "max_wer_increase": 0.01}
        found = rows(dev=[0.9, 0.5], general=[start, start + 0.01])
        assert judge(selection(guard=guard), found, SAVED).best_step == 10
        # An improvement must be more than the least one.
        found = rows(dev=[0.9, start + 0.01, start])
        assert judge(selection(patience=1, min_improvement=0.01), found, SAVED).must_stop


def test_a_checkpoint_that_was_removed_is_not_the_best() -> None:
    found = rows(dev=[0.9, 0.5, 0.3, 0.4])
    assert judge(selection(), found, [10, 30]).best_step == 30
    assert judge(selection(), found, []).best_step is None


def test_a_guard_that_was_not_measured_at_the_start_is_refused() -> None:
    guard = GuardConfig(test_set="general", max_wer_increase=0.02)
    refuse_guard_without_start(guard, rows(general=[0.1]))
    with pytest.raises(UserError, match="did not measure `general` at its start"):
        refuse_guard_without_start(guard, [*rows(dev=[0.9, 0.5]), {"step": 10, "name": "general", "wer": 0.1}])


def test_a_guard_may_stop_the_run() -> None:
    guard = {"test_set": "general", "max_wer_increase": 0.02, "action": "stop"}
    assert not judge(selection(guard=guard), rows(dev=[0.9, 0.5], general=[0.1, 0.11]), SAVED).must_stop
    assert judge(selection(guard=guard), rows(dev=[0.9, 0.5], general=[0.1, 0.13]), SAVED).must_stop


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"selection": {"test_set": "tset"}}, "must be one of `evaluation.test_sets`"),
        ({"selection": {"test_set": "dev"}, "every_steps": None}, "set `evaluation.every_steps`"),
        ({"selection": {"test_set": "dev", "guard": {"test_set": "dev"}}, "at_start": False}, "at_start: true"),
    ],
)
def test_a_selection_that_cannot_work_is_refused(settings: dict[str, Any], sentence: str) -> None:
    tree = {"test_sets": {"dev": {"shards": "dev"}}, "every_steps": EVERY} | settings
    with pytest.raises(ValidationError, match=sentence):
        EvaluationConfig.model_validate(tree)
