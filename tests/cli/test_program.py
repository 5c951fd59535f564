"""The program as a user meets it: a mistake is one sentence and exit code 2, never a traceback."""

import subprocess
import sys

import pytest

from commands import run_program
from corpora import write_lines


def test_the_installed_command_refuses_a_missing_configuration_in_one_sentence(tmp_path):
    assert "nowhere.yaml cannot be read" in run_program("train", "--config", tmp_path / "nowhere.yaml").refusal()


def test_a_run_whose_shards_are_missing_ends_with_one_sentence(recipe, tmp_path):
    override = f"train_data.shards=[{tmp_path / 'nowhere'}]"
    sentence = run_program("train", "--local_rank=0", "--config", recipe, "--set", override).refusal()
    assert f"The shard folder {tmp_path / 'nowhere'} does not exist" in sentence


def test_a_rank_is_told_its_number_before_the_command_where_a_launcher_starts_the_program_itself(recipe):
    printed = run_program("--local_rank=1", "train", "--config", recipe, "--print-config")
    assert (printed.code, printed.err) == (0, "")


def test_a_bad_utterance_after_a_good_one_is_one_sentence(clip, tmp_path):
    good = {"audio_filepath": clip.name, "text": "good", "lang": "en"}
    manifest = write_lines(tmp_path / "m.jsonl", [good, good | {"audio_filepath": "nowhere.wav"}])
    assert f"{manifest}:2: " in run_program("shards", "pack", manifest, tmp_path / "out").refusal()


@pytest.mark.parametrize("command", [("shards", "pack", "{manifest}", "{file}"), ("tiny", "{file}")])
def test_a_file_where_a_folder_is_to_be_made_is_refused(run, speech_manifest, tmp_path, command):
    (tmp_path / "file").touch()
    arguments = [part.format(manifest=speech_manifest, file=tmp_path / "file") for part in command]
    assert str(tmp_path / "file") in run(*arguments).refusal()


@pytest.mark.parametrize("batch_size", ["0", "-1", "many"])
def test_arguments_out_of_range_are_refused_by_the_grammar(run, tiny_model, shard_folder, batch_size):
    result = run("evaluate", tiny_model, shard_folder, "--batch-size", batch_size)
    assert result.code == 2
    assert "--batch-size" in result.err
    assert "Traceback" not in result.err


def test_a_process_that_is_alone_says_its_mistake(run, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "nowhere.yaml cannot be read" in run("train", "--config", tmp_path / "nowhere.yaml").refusal()


def test_commands_of_one_process_say_their_mistakes(run, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "nowhere does not exist" in run("shards", "inspect", tmp_path / "nowhere").refusal()


@pytest.mark.parametrize(
    ("system", "arguments", "sentence"),
    [
        ("win32", ["recipes"], "voxtral-dist runs on Linux: on Windows, install and start it in WSL 2."),
        ("darwin", ["train", "--config", "demo"], "`train` computes with the model, on Linux only"),
        ("darwin", ["transcribe", "m", "a.wav"], "docs/serving.md says what serves a trained model on a Mac"),
    ],
)
def test_other_systems_are_refused(run, monkeypatch, system, arguments, sentence):
    monkeypatch.setattr(sys, "platform", system)
    assert sentence in run(*arguments).refusal()


def test_a_mac_does_what_needs_no_model(run, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert run("recipes").code == 0
    refused = run("evaluate", "m", "nowhere", "--server", "http://localhost:1")
    assert "The shard folder nowhere does not exist" in refused.refusal()


def test_help_starts_without_the_libraries_that_cost_seconds():
    # Windows has no fcntl, and gets a sentence instead.
    heavy = ("torch", "transformers", "deepspeed", "mistral_common", "webdataset", "soundfile", "fsspec", "fcntl")
    script = (
        "import sys\n"
        "from voxtral_dist.cli.main import main\n"
        "try:\n"
        "    main(['shards', 'pack', '--help'])\n"
        "finally:\n"
        f"    print([name for name in {heavy!r} if name in sys.modules])\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"
