"""`voxtral-dist init` writes a configuration that fits, with the commands to run."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from voxtral_dist.config import load_config, recipes
from voxtral_dist.estimate import fitting


@pytest.fixture
def folder(monkeypatch, tmp_path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def only(monkeypatch):
    """Limits the recipes, of which each takes seconds."""

    def limit(*names: str) -> None:
        monkeypatch.setattr(fitting, "recipes", lambda: {name: recipes()[name] for name in names})

    return limit


def commands_of(text: str) -> list[str]:
    return re.findall(r"^#?\s+((?:voxtral-dist|torchrun|pip|DS_ACC).*)$", text, re.MULTILINE)


def test_a_configuration_fits_and_says_what_to_run(run, folder, only):
    only("voxtral_mini_lora")
    audio = ["--audio", "my audio.csv", "--language", "Modern Greek"]
    written = run("init", "greek.yaml", *audio, "--gpu", "rtx 4090")
    assert written.code == 0
    text = Path("greek.yaml").read_text()
    assert commands_of(text) == commands_of(written.out)
    install, pack, _, plan, train = commands_of(text)
    assert install == "pip install 'voxtral-dist[lora]'"
    assert pack == "voxtral-dist shards pack 'my audio.csv' shards/data --encode flac --dev 5% --language el"
    assert plan == "voxtral-dist plan --config greek.yaml --gpus 1 --gpu 'rtx 4090'"
    assert train == "torchrun --nproc_per_node 1 --no_python voxtral-dist train --config greek.yaml"
    config = load_config(Path("greek.yaml"))
    recipe = load_config(recipes()["voxtral_mini_lora"])
    assert config.run_dir == Path("runs/greek")
    assert config.model == recipe.model
    assert config.optimizer == recipe.optimizer
    assert "# windows of 30 s per GPU and forward pass" in text
    refused = run("init", "greek.yaml", *audio, "--gpu", "rtx 4090")
    assert refused.code == 2
    assert "exists" in refused.err


def test_smaller_batches_are_written_where_the_recipe_does_not_fit_as_it_is(run, folder, only):
    only("voxtral_mini_lora")
    assert run("init", "run.yaml", "--audio", "a.csv", "--gpu-memory", "22GB").code == 0
    config = load_config(Path("run.yaml"))
    assert config.evaluation.batch_size == 32
    planned = run("plan", "--config", "run.yaml", "--gpu-memory", "22GB", "--json")
    assert json.loads(planned.out)["configured"]["fits"]


def test_the_first_answers_at_a_terminal_make_a_run_on_cpus_that_is_planned_and_checked(run, folder, monkeypatch):
    answers = iter(["", "audio", "ja", "", "2"])
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert run("init", "run.yaml").code == 0
    assert next(answers, None) is None
    config = load_config(Path("run.yaml"))
    assert config.evaluation.selection.metric == "cer"
    assert run("tiny", "models/tiny").code == 0
    assert run("config", "check", "run.yaml").code == 0
    planned = run("plan", "--config", "run.yaml", "--gpus", "2", "--device", "cpu", "--host-memory", "16GB", "--json")
    assert json.loads(planned.out)["configured"]["fits"]


def test_an_answer_that_cannot_be_used_is_asked_for_again(run, folder, monkeypatch):
    answers = iter(["", "audio", "Klingon", "ja", "GTX 970", "", "two", "0", "2"])
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    written = run("init", "run.yaml")
    assert (written.code, written.err) == (0, "")
    assert next(answers, None) is None
    assert "The answer has the language 'Klingon', which is not an ISO 639-1 code" in written.out
    assert "`--gpu` must be one of" in written.out
    assert "The answer must be a positive whole number, but is 'two' instead." in written.out
    assert "The answer must be a positive whole number, but is '0' instead." in written.out
    assert "--nproc_per_node 2" in written.out


def test_amounts_of_memory_are_asked_for_again(run, folder, only, monkeypatch):
    only("voxtral_mini_lora")
    answers = iter(["64", "64 apples", "64GB"])
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    options = ["--audio", "a.csv", "--language", "fr", "--gpu", "RTX 4090", "--gpus", "1"]
    written = run("init", "run.yaml", *options)
    assert written.code == 0
    assert written.out.count("`--host-memory` must be a positive amount of memory with a unit") == 2


def test_an_input_that_ends_is_a_sentence(run, folder, monkeypatch):
    def ended(question):
        raise EOFError

    monkeypatch.setattr("builtins.input", ended)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert "The input ended before all was answered" in run("init", "run.yaml").refusal()
    monkeypatch.setattr(sys, "stdin", None)
    assert "Give --audio, and the machine" in run("init", "run.yaml").refusal()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Give --audio, and the machine"),
        (["--audio", "a", "--gpu", "GTX 970"], "`--gpu` must be one of"),
        (["--audio", "a", "--cpu", "--language", "Klingon"], "`--language` has the language 'Klingon'"),
        (["--audio", "a", "--cpu", "--gpus", "12"], "`--gpus` must be those of whole nodes of 8, but is 12 instead"),
        (["--audio", "a", "--gpu-memory", "4GB"], "No recipe fits. The smallest needs"),
    ],
)
def test_what_cannot_be_planned_is_refused_and_nothing_is_written(run, folder, only, options, message):
    only("voxtral_mini_qlora")
    refused = run("init", "run.yaml", *options)
    assert refused.code == 2
    assert message in refused.err
    assert not Path("run.yaml").exists()


MACHINES = {
    "2 cores": ["--cpu", "--gpus", "2"],
    "12 GB": ["--gpu-memory", "12GB", "--host-memory", "32GB"],
    "16 GB": ["--gpu-memory", "16GB"],
    "L4": ["--gpu", "L4", "--host-memory", "32GB"],
    "RTX 4090": ["--gpu", "RTX 4090", "--host-memory", "128GB", "--train", "all"],
    "2 x RTX 3090": ["--gpu", "RTX 3090", "--gpus", "2", "--train", "lora"],
    "L40S": ["--gpu", "L40S", "--host-memory", "256GB"],
    "H100": ["--gpu", "H100"],
    "8 x A100": ["--gpu", "A100", "--gpus", "8", "--host-memory", "1TB"],
    "4 nodes of 8 x H100": ["--gpu", "H100", "--gpus", "32", "--host-memory", "1TB"],
}


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES.keys())
def test_every_machine_gets_a_configuration_that_plan_accepts(run, folder, machine):
    assert run("init", "run.yaml", "--audio", "a.csv", *machine).code == 0
    *_, plan, _ = commands_of(Path("run.yaml").read_text())
    if "--cpu" in machine:
        run("tiny", "models/tiny")
        plan += " --host-memory 16GB"
    assert run("config", "check", "run.yaml").code == 0
    planned = run(*shlex.split(plan)[1:], "--json")
    assert planned.code == 0
    assert json.loads(planned.out)["configured"]["fits"]
