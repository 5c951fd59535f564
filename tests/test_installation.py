"""What pip and uv install is what is tested."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_uv_takes_the_versions_of_constraints_txt(project: dict[str, Any]) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    expected = "".join(f'    "{pin}",\n' for pin in pins)
    assert project["tool"]["uv"]["constraint-dependencies"] == pins, f"must be [\n{expected}]"


def test_the_versions_of_python_are_those_that_are_said_to_work(project: dict[str, Any]) -> None:
    described = re.findall(r":: (3\.\d+)$", "\n".join(project["project"]["classifiers"]), re.MULTILINE)
    first, last = described[0], described[-1]
    after = f"3.{int(last.removeprefix('3.')) + 1}"
    assert project["project"]["requires-python"] == f">={first},<{after}"
    for page in ("README.md", "CONTRIBUTING.md", "docs/index.md", "docs/install.md"):
        assert f"Python {first} to {last}" in (ROOT / page).read_text(encoding="utf-8")
