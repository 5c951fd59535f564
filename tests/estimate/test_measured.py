"""The estimate of memory agrees with what real ranks use on a CPU.

All tests are slow ones: beside other tests on the same cores, a rank uses more memory than alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from voxtral_dist.model.tiny import build_tiny_voxtral

from plan_memory import LARGE, MIDDLE, NUM_EXAMPLES, NUM_TARGETS, SMALL, STAGES, zero_settings
from workloads.rank_memory import compare, run_config

pytestmark = pytest.mark.slow

AGREEMENT = 0.85


@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_plans_within_15_percent_of_a_real_run(tmp_path: Path, stage: str) -> None:
    model = tmp_path / "model"
    build_tiny_voxtral(model, SMALL)
    found = compare(run_config(model, zero_settings(stage), tmp_path), NUM_EXAMPLES, NUM_TARGETS)
    assert found["agreement"] >= AGREEMENT, found


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("shape", [MIDDLE, LARGE], ids=["middle", "large"])
def test_plans_larger_models_under_every_stage(tmp_path: Path, shape, stage: str) -> None:
    model = tmp_path / "model"
    build_tiny_voxtral(model, shape)
    found = compare(run_config(model, zero_settings(stage), tmp_path), NUM_EXAMPLES, NUM_TARGETS)
    assert found["agreement"] >= AGREEMENT, found


@pytest.mark.parametrize("change", [{"precision": "bfloat16"}, {"activation_checkpointing": {"encoder": 1}}], ids=str)
@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_plans_precisions_and_checkpoints(tmp_path: Path, stage: str, change: dict[str, object]) -> None:
    model = tmp_path / "model"
    build_tiny_voxtral(model, SMALL)
    found = compare(run_config(model, zero_settings(stage), tmp_path, **change), NUM_EXAMPLES, NUM_TARGETS)
    assert found["agreement"] >= AGREEMENT, found
