"""Recipes and DeepSpeed files are found by name, in a checkout and where only the wheel is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from voxtral_dist.config import deepspeed_file, deepspeed_files, load_config, recipes
from voxtral_dist.errors import UserError

ROOT = Path(__file__).parent.parent.parent


def test_every_recipe_and_deepspeed_file_of_the_checkout_is_found():
    assert recipes() == {path.stem: path for path in (ROOT / "launch" / "recipes").iterdir()}
    assert deepspeed_files() == {path.stem: path for path in (ROOT / "ds_configs").iterdir()}


def test_a_recipe_is_a_configuration_by_its_name_and_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(Path("digits")) == load_config(ROOT / "launch" / "recipes" / "digits.yaml")
    Path("digits").write_text((ROOT / "launch" / "recipes" / "demo.yaml").read_text())
    assert load_config(Path("digits")).run_dir == Path("runs/demo")


def test_a_name_that_is_no_recipe_is_refused_with_the_names():
    with pytest.raises(UserError, match=r"mini_lora cannot be read: No such file .*The recipes .* voxtral_mini_lora"):
        load_config(Path("mini_lora"))


@pytest.mark.parametrize(
    ("given", "found"),
    [("zero2", "zero2"), ("zero2.json", "zero2"), ("ds_configs/zero3_nvme.json", "zero3_nvme")],
)
def test_a_deepspeed_file_is_found_by_its_name_outside_of_a_checkout(tmp_path, monkeypatch, given, found):
    monkeypatch.chdir(tmp_path)
    assert deepspeed_file(Path(given)) == deepspeed_files()[found]


@pytest.mark.parametrize("given", ["other/zero2.json", "zero2.yaml", "zero9"])
def test_other_paths_are_left_as_they_are(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    assert deepspeed_file(Path(given)) == Path(given)
    Path("zero2").write_text("{}")
    assert deepspeed_file(Path("zero2")) == Path("zero2"), "the user's own file"


def test_the_wheel_alone_has_recipes_and_deepspeed_files(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    program = "from voxtral_dist.config import *; print(*recipes(), *deepspeed_files())"
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        check=True,
        capture_output=True,
        text=True,
    )
    assert ended.stdout.split() == [*recipes(), *deepspeed_files()]
