"""The examples of launch/kubernetes and launch/slurm are what `voxtral-dist launch` prints."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


def examples() -> Any:
    spec = spec_from_file_location("examples", LAUNCH / "examples.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODULE = examples()


@pytest.mark.parametrize("name", MODULE.EXAMPLES)
def test_an_example_is_the_output_of_its_command(name):
    assert (LAUNCH / name).read_text(encoding="utf-8") == MODULE.rendered(MODULE.EXAMPLES[name]), (
        "run `python launch/examples.py`"
    )


def test_all_manifests_and_scripts_are_examples():
    found = {
        path.relative_to(LAUNCH).as_posix() for path in [*LAUNCH.glob("kubernetes/*.yaml"), *LAUNCH.glob("slurm/*")]
    }
    assert found == set(MODULE.EXAMPLES)
