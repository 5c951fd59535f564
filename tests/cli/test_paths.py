"""A wrong path is refused before torch is imported: within a second, by what is wrong with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from voxtral_dist.cli.main import build_parser
from voxtral_dist.distributed.launchers import is_on_several_hosts
from voxtral_dist.errors import UserError
from voxtral_dist.model.folders import refuse_unknown_name, refuse_wrong_model

from hub_server import Repository
from runs import free_port

# Commands with a path that leads nowhere or to something else, and what the message says.
WRONG = {
    "train --config nowhere.yaml": "nowhere.yaml cannot be read",
    "train --config run.yaml": "the folder models/tinny does not exist; models holds tiny: did you mean models/tiny?",
    "train --config run.yaml --set model.path=models/tiny": "The shard folder shards/nowhere does not exist",
    "train --config other.yaml --set model.path=models/tiny": "`engine.deepspeed`: zero9 does not exist",
    "evaluate models/a/b shards": "`MODEL`: the folder models/a/b does not exist",
    "evaluate models/tiny nowhere": "The shard folder nowhere does not exist",
    "evaluate models/tiny shards --words nowhere.txt": "`--words`: nowhere.txt cannot be read",
    f"transcribe {300 * 'a'}/x/y clip.wav": "aaa/x/y does not exist",
    "transcribe ./tiny clip.wav": "`MODEL`: the folder ./tiny does not exist",
    "transcribe models/tiny nowhere.wav": "The recording nowhere.wav cannot be read",
    "transcribe runs/x clip.wav": "`MODEL`: runs/x is a run, not a model: give runs/x/export",
    "evaluate runs/y shards": "exported no model yet: give its newest checkpoint, runs/y/checkpoints/step-0000020",
    "transcribe runs/y/checkpoints clip.wav": "holds the checkpoints of a run: it has exported no model yet: give its",
    "evaluate runs/x/adapter shards": "holds adapters without their model: give runs/x/export",
    "transcribe clip.wav clip.wav": "`MODEL`: clip.wav is a file",
    "train --config run.yaml --set model.path=runs/y": "write one by `voxtral-dist export runs/y FOLDER`",
    "train --config run.yaml --set model.path=runs/y/checkpoints/step-0000020": "is a checkpoint, not a model",
    "export nowhere/a/b out": "`SOURCE`: the folder nowhere/a/b does not exist",
    "report nowhere": "nowhere holds no results",
    "score nowhere.jsonl": "The hypotheses nowhere.jsonl cannot be read",
    "shards pack nowhere.jsonl out": "The manifest nowhere.jsonl does not exist",
    "shards index nowhere": "The tars nowhere cannot be listed",
    "shards inspect nowhere": "The shard folder nowhere does not exist",
    "shards verify nowhere": "The shard folder nowhere does not exist",
    "shards show nowhere key": "The shard folder nowhere does not exist",
    "shards merge nowhere": "The folder nowhere holds no parts",
    "plan --config run.yaml": "did you mean models/tiny?",
    "config check nowhere.yaml": "nowhere.yaml cannot be read",
    "config check other.yaml": "`engine.deepspeed`: zero9 does not exist",
    "launch slurm --config run.yaml --nodes 1 --gpus 1": "did you mean models/tiny?",
    "init nowhere/run.yaml --audio a --cpu": "The folder nowhere does not exist",
    "tiny clip.wav": "clip.wav is a file",
}
CALLER = """
import contextlib, io, json, shlex, sys
from voxtral_dist.cli.main import main
said = {}
for command in json.loads(sys.stdin.read()):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            main(shlex.split(command))
        except SystemExit as end:
            said[command] = [end.code, errors.getvalue(), "torch" in sys.modules]
print(json.dumps(said))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    for name in ("models/tiny", "runs/x/export", "runs/x/adapter", "runs/y/checkpoints/step-0000020"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("runs/x", "runs/y"):
        (tmp_path / name / "config.yaml").touch()
        (tmp_path / name / "metrics.jsonl").touch()
    (tmp_path / "runs/y/checkpoints/step-0000020/complete.json").touch()
    (tmp_path / "runs/x/adapter/adapter_config.json").touch()
    (tmp_path / "models/tiny/config.json").touch()
    (tmp_path / "clip.wav").touch()
    tree = {
        "run_dir": "runs/z",
        "num_steps": 2,
        "model": {"path": "models/tinny"},
        "train_data": {"shards": "shards/nowhere", "max_examples": 4},
        "optimizer": {"learning_rate": 1e-4, "warmup_steps": 0},
        "engine": {"deepspeed": "zero1"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(tree | {"engine": {"deepspeed": "zero9"}}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_refuses_a_wrong_path_before_torch_is_imported(folder):
    ended = subprocess.run(
        [sys.executable, "-c", CALLER],
        input=json.dumps(list(WRONG)),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    said = json.loads(ended.stdout.splitlines()[-1])
    for command, sentence in WRONG.items():
        code, message, has_torch = said[command]
        assert (code, message.count("\n")) == (2, 1), (command, message)
        assert sentence in message, command
        assert not has_torch, command


def test_a_name_on_the_hub_is_left_to_the_hub(folder):
    for name in ("mistralai/Voxtral-Mini-3B-2507", "somebody/model", "models/tiny"):
        refuse_wrong_model(name)
    # The owner's name may be that of a folder here, where somebody downloaded another model of his.
    (folder / "mistralai").mkdir()
    refuse_wrong_model("mistralai/Voxtral-Small-24B-2507")
    with pytest.raises(UserError, match="hf download models/other"):
        refuse_wrong_model("models/other")


NAMED = {
    "export somebody/model out": "`SOURCE`: there is no folder somebody/model, and the hub",
    "evaluate somebody/model shards": "`MODEL`: there is no folder somebody/model, and the hub",
    "transcribe somebody/model clip.wav": "`MODEL`: there is no folder somebody/model, and the hub",
    "train --config hub.yaml": "`model.path`: there is no folder somebody/model, and the hub",
}


@pytest.mark.parametrize("command", NAMED)
def test_a_name_that_is_no_folder_is_refused_where_the_hub_has_none_or_cannot_be_reached(
    command, folder, run, hub, shard_folder, monkeypatch
):
    (folder / "shards").symlink_to(shard_folder)
    tree = yaml.safe_load((folder / "run.yaml").read_text())
    tree["model"]["path"], tree["train_data"]["shards"] = "somebody/model", "shards"
    (folder / "hub.yaml").write_text(yaml.safe_dump(tree))
    refused = run(*command.split()).refusal()
    assert f"{NAMED[command]} has no model of this name" in refused
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    refused = run(*command.split()).refusal()
    assert f"{NAMED[command]}, which may have a model of this name, cannot be reached: " in refused


def test_a_name_that_the_hub_has_passes(folder, hub, monkeypatch):
    hub.repositories["somebody/model"] = Repository(is_private=True)
    refuse_unknown_name("somebody/model")
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match="cannot be reached"):
        refuse_unknown_name("somebody/model")
    with pytest.raises(UserError, match="allows no such name"):
        refuse_unknown_name("somebody/a..b")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refuse_unknown_name("somebody/model")


def test_a_checkpoint_is_taken_where_one_may_be_given(folder):
    refuse_wrong_model("runs/y/checkpoints/step-0000020", takes_checkpoints=True)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, False),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, False),
        ({"WORLD_SIZE": "4", "LOCAL_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, True),
        ({"WORLD_SIZE": "4"}, False),
    ],
)
def test_ranks_on_several_hosts_are_known_by_the_launchers_variables(variables, expected, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_on_several_hosts() is expected


@pytest.mark.parametrize(
    ("command", "work"),
    [
        ("train --config run.yaml", "voxtral_dist.train.train_model"),
        ("evaluate models/tinny nowhere --words nowhere.txt", "voxtral_dist.cli.evaluate._evaluate"),
        ("transcribe models/tinny nowhere.wav", "voxtral_dist.transcribe.transcribe"),
    ],
)
def test_ranks_on_several_hosts_meet_before_one_may_refuse_a_path(command, work, folder, monkeypatch):
    """One that ended alone would leave the others waiting for it."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    done = []
    monkeypatch.setattr(work, lambda *_, **__: done.append(work) or 0)
    parsed = build_parser().parse_args(command.split())
    assert parsed.run(parsed) == 0
    assert done == [work]
