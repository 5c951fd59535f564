"""The examples of launch/kubernetes and launch/slurm are what `voxtral-dist launch` prints."""

import pytest

from scripts import REPOSITORY, script

LAUNCH = REPOSITORY / "launch"


MODULE = script("launch/examples.py")


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
