"""The best checkpoint, the early end of a run, and the limit of the guard set."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from voxtral_dist.config import EvaluationConfig, GuardConfig, SelectionConfig
from voxtral_dist.errors import UserError
from voxtral_dist.training.selection import judge, refuse_guard_without_start, selected_step, write_best

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
    assert (verdict.best_step, verdict.best_rate) == (20, 0.3), "the untrained model is no candidate"
    assert not verdict.must_stop
    assert verdict.messages == ()


def test_before_the_first_evaluation_there_is_no_best() -> None:
    assert judge(selection(), [], SAVED).best_step is None
    assert judge(selection(), rows(dev=[0.9]), SAVED).best_step is None


def test_an_evaluation_that_was_repeated_counts_once() -> None:
    found = [*rows(dev=[0.9, 0.5]), {"step": 10, "name": "dev", "wer": 0.7}, *rows(other=[0.1, 0.1])]
    assert judge(selection(), found, SAVED).best_rate == 0.7


def test_the_best_by_cer_is_named_with_its_rate(tmp_path) -> None:
    found = [row | {"cer": cer} for row, cer in zip(rows(dev=[1.0, 1.0, 1.0]), (0.9, 0.2, 0.3), strict=True)]
    verdict = judge(selection(metric="cer"), found, SAVED)
    assert (verdict.best_step, verdict.best_rate, verdict.metric) == (10, 0.2, "cer")
    write_best(tmp_path, verdict)
    assert json.loads((tmp_path / "best.json").read_text()) == {
        "step": 10,
        "cer": 0.2,
        "checkpoint": "checkpoints/step-0000010",
    }
    assert selected_step(tmp_path) == 10
    patient = judge(selection(metric="cer", patience=1), found, SAVED)
    assert patient.must_stop
    assert patient.messages == (
        "the CER of `dev` has not improved in 1 evaluation (`evaluation.selection.patience`): the run stops",
    )


def test_a_guard_by_cer_limits_the_selection() -> None:
    guard = {"test_set": "general", "max_wer_increase": 0.02, "metric": "cer"}
    found = rows(dev=[0.9, 0.4, 0.5])
    found += [row | {"cer": cer} for row, cer in zip(rows(general=[0.5] * 3), (0.1, 0.2, 0.1), strict=True)]
    verdict = judge(selection(guard=guard), found, SAVED)
    assert verdict.best_step == 20
    at_ten = judge(selection(guard=guard), [row for row in found if row["step"] <= 10], SAVED)
    assert at_ten.messages[0].startswith("the CER of the guard `general` is 10.00 points above")


def test_selection_by_wer_warns_once_of_a_language_without_spaces() -> None:
    found = [row | {"num_without_spaces": 9, "num_utterances": 10, "cer": 0.5} for row in rows(dev=[1.0, 1.0])]
    (message,) = judge(selection(), found[:1], SAVED).messages
    assert message.startswith("`dev` has 9 of 10 utterances in languages without spaces between words")
    assert message.endswith("set `evaluation.selection.metric: cer`")
    assert judge(selection(), found, SAVED).messages == ()
    assert judge(selection(metric="cer"), found[:1], SAVED).messages == ()


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
