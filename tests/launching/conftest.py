"""A configuration that `voxtral-dist launch` takes, and the command run in this process."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from voxtral_dist.config import recipes

from commands import Result, run_command

Launch = Callable[..., Result]


@pytest.fixture
def launch(capsys) -> Launch:
    return partial(run_command, capsys, "launch")


@pytest.fixture
def recipe(tmp_path) -> Path:
    """A copy of a recipe, as users have it."""
    path = tmp_path / "run.yaml"
    path.write_text(recipes()["voxtral_mini_full"].read_text(encoding="utf-8"), encoding="utf-8")
    return path
