"""Judgements of updates by their losses and norms, and the state with which a resumed run judges alike."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from voxtral_dist.checkpoints.complete import CompleteCheckpoint, read_complete
from voxtral_dist.checkpoints.progress import GuardState, TrainProgress
from voxtral_dist.config import OptimizerConfig
from voxtral_dist.engine.engine import StepUpdate
from voxtral_dist.training.guards import MIN_NORMS, NUM_NORMS, Guards, Judgement

RATE = 1e-3


def settings(**fields: object) -> OptimizerConfig:
    return OptimizerConfig.model_validate({"learning_rate": RATE, **fields})


def judged(guards: Guards, grad_norm: float, loss: float = 1.0) -> Judgement:
    """The judgement of a step, after a check that `accepts` says the same before it."""
    is_accepted = math.isfinite(grad_norm) and guards.accepts(loss, grad_norm)
    judgement = guards.judge(loss, StepUpdate(grad_norm, RATE))
    assert judgement.is_skipped != is_accepted
    return judgement


def after(num_steps: int, config: OptimizerConfig) -> Guards:
    """Guards after some steps with norms of 0.9, 1.0 and 1.1."""
    guards = Guards(config)
    for number in range(num_steps):
        assert judged(guards, 1.0 + 0.1 * (number % 3 - 1)).reason is None
    return guards


def test_a_norm_far_above_the_running_median_is_a_spike() -> None:
    guards = after(MIN_NORMS, settings(spike_factor=3.0))
    assert judged(guards, 2.9).reason is None
    assert judged(guards, 3.1) == Judgement("spike", is_skipped=False, median=pytest.approx(1.0))
    few = after(MIN_NORMS - 1, settings(spike_factor=3.0))
    assert judged(few, 1e6) == Judgement(None, is_skipped=False, median=None)
    assert judged(after(MIN_NORMS, settings(spike_factor=None)), 1e6).reason is None


def test_skipped_spikes_are_limited_in_a_row_and_large_gradients_become_usual() -> None:
    guards = after(NUM_NORMS, settings(spike_factor=3.0, skip_spikes=True, max_skipped_in_a_row=2))
    skipped = [judged(guards, 5.0).is_skipped for _ in range(6)]
    assert skipped == [True, True, False, True, True, False]
    assert not guards.must_end
    reasons = [judged(guards, 5.0).reason for _ in range(NUM_NORMS)]
    assert reasons[-1] is None, "half of the norms are as large"
    assert len(guards.state.grad_norms) == NUM_NORMS


@pytest.mark.parametrize(("grad_norm", "loss", "reason"), [(math.inf, 1.0, "gradient"), (1.0, math.nan, "loss")])
def test_what_is_not_finite_is_skipped_counted_and_no_part_of_the_median(
    grad_norm: float, loss: float, reason: str
) -> None:
    guards = after(3, settings(max_skipped_in_a_row=1))
    before = guards.state.grad_norms
    assert judged(guards, grad_norm, loss).reason == reason
    assert guards.state == GuardState(num_skipped=1, num_in_a_row=1, grad_norms=before)
    assert not guards.must_end
    judged(guards, grad_norm, loss)
    assert guards.must_end
    assert judged(guards, 1.0).reason is None
    assert guards.state.num_in_a_row == 0
    assert not guards.must_end


def test_an_overflow_of_float16_is_usual() -> None:
    guards = after(3, settings(max_skipped_in_a_row=0))
    before = guards.state
    assert guards.judge(1.0, StepUpdate(math.inf, RATE, is_skipped=True)).reason is None
    assert guards.state == before


def test_a_resumed_run_judges_like_the_unbroken_one(tmp_path: Path) -> None:
    config = settings(spike_factor=1.5, skip_spikes=True)
    norms = [1.0 + 0.7 * math.sin(3.0 * number) ** 5 for number in range(200)]
    unbroken = Guards(config)
    expected = [judged(unbroken, norm) for norm in norms]
    assert {one.reason for one in expected} == {None, "spike"}
    first = Guards(config)
    actual = [judged(first, norm) for norm in norms[:90]]
    progress = TrainProgress(step=90, guards=first.state)
    stored = CompleteCheckpoint(progress=progress, data={}, model={}, shapes={}, scalars={}, files={}, layout="whole")
    stored.write(tmp_path)
    second = Guards(config, read_complete(tmp_path).progress.guards)
    actual += [judged(second, norm) for norm in norms[90:]]
    assert actual == expected
