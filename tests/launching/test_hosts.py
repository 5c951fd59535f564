"""Files of `launch hostfile` and `launch skypilot`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

# Cut from SkyPilot's own schema, which its comment names.
PUBLISHED = Draft202012Validator(json.loads(Path(__file__).with_name("skypilot-task.json").read_text(encoding="utf-8")))


def test_a_hostfile_is_what_deepspeed_reads(launch, recipe):
    result = launch("hostfile", "--config", recipe, "--hosts", "node-a", "10.0.0.2", "--gpus", 8, "--set", "seed=3")
    assert (result.code, result.err) == (0, "")
    # The pattern of deepspeed/launcher/runner.py, which skips comments.
    lines = [line for line in result.out.splitlines() if not line.startswith("#")]
    assert [re.fullmatch(r"(\S+)\s+slots=(\d+)", line).groups() for line in lines] == [
        ("node-a", "8"),
        ("10.0.0.2", "8"),
    ]
    assert f"deepspeed --hostfile FILE launch/train.py --config {recipe} --set seed=3\n" in result.out


@pytest.mark.parametrize(
    ("hosts", "sentence"),
    [(["a", "b", "a"], "must name each host once"), (["a slots=8"], "must be names or addresses of hosts")],
)
def test_wrong_hosts_are_refused(launch, recipe, hosts, sentence):
    assert sentence in launch("hostfile", "--config", recipe, "--hosts", *hosts, "--gpus", 8).refusal()


@pytest.fixture
def task(launch, recipe):
    def make(*options: str, nodes: int = 2):
        arguments = ["--config", recipe, "--nodes", nodes, "--gpus", 8, "--gpu", "H100"]
        result = launch("skypilot", *arguments, *options)
        assert (result.code, result.err) == (0, "")
        tree = yaml.safe_load(result.out)
        assert list(PUBLISHED.iter_errors(tree)) == []
        return tree

    return make


def test_a_task_of_skypilot_recovers_by_exit_code(task, recipe):
    tree = task("--spot", "--infra", "aws/us-east-1", "--set", "seed=3")
    assert tree["num_nodes"] == 2
    assert tree["resources"] == {
        "infra": "aws/us-east-1",
        "accelerators": "H100:8",
        "use_spot": True,
        "disk_size": 512,
        "network_tier": "best",
        "job_recovery": {"max_restarts_on_errors": 20, "recover_on_exit_codes": [75]},
    }
    assert tree["file_mounts"] == {"/config/config.yaml": str(recipe)}
    assert tree["run"] == "source .venv/bin/activate\ndocker/entrypoint --config /config/config.yaml --set seed=3\n"
    assert (tree["workdir"], tree["setup"], tree["secrets"]) == (".", "make install\n", {"HF_TOKEN": None})


def test_a_task_of_skypilot_in_an_image(task, recipe):
    tree = task("--image", "registry/image:1", "--volume", "shared", nodes=1)
    assert tree["resources"]["image_id"] == "docker:registry/image:1"
    assert tree["file_mounts"] == {"/config/config.yaml": str(recipe)}
    assert tree["volumes"] == {"/runs": "shared"}
    assert tree["run"] == "cd /opt/voxtral-dist\nvoxtral-entrypoint --config /config/config.yaml\n"
    assert not {"workdir", "setup"} & tree.keys()


def test_a_task_of_skypilot_has_one_number_of_nodes(launch, recipe):
    arguments = ["--config", recipe, "--nodes", "2:4", "--gpus", 8, "--gpu", "H100"]
    assert "`--nodes` must be one number with skypilot" in launch("skypilot", *arguments).refusal()


def test_the_published_schema_refuses_what_skypilot_does(task):
    tree = task()
    for key, value in (("infra", "mars/x"), ("job_recovery", {"recover_on_exit_codes": [300]}), ("gpus", 8)):
        assert list(PUBLISHED.iter_errors(tree | {"resources": tree["resources"] | {key: value}}))
