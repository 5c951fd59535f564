"""Recipes that fit a machine, found without a configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from voxtral_dist.config import load_config, recipes
from voxtral_dist.estimate import fitting
from voxtral_dist.estimate.estimate import estimate_run
from voxtral_dist.estimate.estimator import Machine
from voxtral_dist.estimate.fitting import Fit, _RecipeFitter, fitting_recipes, lines_of_fits
from voxtral_dist.estimate.gpus import GPUS

GB = 10**9


def assert_is_what_plan_says(fit: Fit, machine: Machine) -> None:
    estimate = estimate_run(load_config(Path(fit.recipe), fit.overrides), machine)
    assert estimate.memory.configured.fits
    assert estimate.memory.configured.device_bytes == fit.row.device_bytes
    assert estimate.memory.configured.host_bytes_of_node == fit.row.host_bytes_of_node
    if fit.clips_per_second is not None:
        assert estimate.times is not None
        assert estimate.times.configured.clips_per_second == fit.clips_per_second


@pytest.fixture
def one_recipe(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fitting, "recipes", lambda: {"voxtral_mini_lora": recipes()["voxtral_mini_lora"]})


@pytest.fixture
def estimated(monkeypatch) -> list[tuple[str, tuple[str, ...]]]:
    """The recipes that were estimated, with their overrides."""
    found = []
    estimate = _RecipeFitter._estimated

    def recorded(fitter, windows, decoded):
        found.append((fitter._name, fitter._with(windows, decoded)))
        return estimate(fitter, windows, decoded)

    monkeypatch.setattr(_RecipeFitter, "_estimated", recorded)
    return found


@pytest.mark.parametrize(("gigabytes", "overrides"), [(24, ()), (22, ("evaluation.batch_size=32",))])
def test_batches_are_halved_until_a_recipe_fits(one_recipe, estimated, gigabytes, overrides):
    machine = Machine(gpu_memory=gigabytes * GB)
    fits = {fit.overrides[:1] == ("engine.deepspeed=zero3_offload",): fit for fit in fitting_recipes(machine)}
    assert len(estimated) == len(set(estimated)), "an estimate takes seconds"
    if not overrides:
        assert estimated == [(fit.recipe, fit.overrides) for fit in (fits[False], fits[True])]
    assert fits[False].overrides == overrides
    assert fits[False].clips_per_second is None, "the GPU has no name"
    assert_is_what_plan_says(fits[False], machine)
    assert fits[True].row.host_bytes_of_node > fits[False].row.host_bytes_of_node


def test_recipes_that_do_not_fit_are_listed_with_their_smallest_batches(one_recipe):
    machine = Machine(gpu_memory=4 * GB, host_memory=8 * GB)
    fits = fitting_recipes(machine)
    assert [fit.row.fits for fit in fits] == [False, False]
    assert {fit.config.train_data.max_windows for fit in fits} == {1}
    text = "\n".join(lines_of_fits(fits, machine))
    assert "1 GPU of 4.0 GB" in text
    assert "In full" not in text


@pytest.mark.slow
@pytest.mark.parametrize(("gpu", "num_gpus", "host"), [("L4", 1, 32), ("RTX 4090", 1, 128), ("A100", 8, 512)])
def test_every_recipe_is_as_plan_says(tmp_path, monkeypatch, gpu, num_gpus, host):
    monkeypatch.chdir(tmp_path)
    machine = Machine(num_gpus, gpu_memory=GPUS[gpu].memory_bytes, host_memory=host * GB, gpu=GPUS[gpu])
    fits = fitting_recipes(machine)
    assert {fit.recipe for fit in fits} == {name for name in recipes() if name.startswith("voxtral")}
    fitting_ones = [fit for fit in fits if fit.row.fits]
    assert fits[: len(fitting_ones)] == fitting_ones
    for fit in fitting_ones:
        assert_is_what_plan_says(fit, machine)
