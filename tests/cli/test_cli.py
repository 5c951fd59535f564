"""The command line as a user meets it: a mistake is one sentence and exit code 2, never a traceback."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import soundfile
import torch
import torch.distributed as dist
import yaml
from transformers import VoxtralForConditionalGeneration

from voxtral_dist.config import EvaluationConfig, load_config
from voxtral_dist.data.examples.prompting import Prompting
from voxtral_dist.data.stored.index import read_index
from voxtral_dist.distributed.world import World
from voxtral_dist.model.tiny import build_tiny_voxtral
from voxtral_dist.transcription.recordings import ClipError, ClipTranscriber, ClipTranscript, Question, Segment, to_srt

from commands import Result, run_command
from corpora import TINY_SHAPE, tone, write_lines

PROGRAM = Path(sys.executable).with_name("voxtral-dist")


Run = Callable[..., Result]


@pytest.fixture
def run(capsys, monkeypatch) -> Run:
    """Runs a command in this process."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def run_main(*arguments: object) -> Result:
        try:
            return run_command(capsys, *arguments)
        finally:
            # A command that failed leaves its group to the end of the process.
            if dist.is_initialized():
                dist.destroy_process_group()

    return run_main


def run_program(*arguments: object) -> Result:
    """Runs the installed command in a process of its own."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [str(PROGRAM), *map(str, arguments)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    return Result(ended.returncode, ended.stdout, ended.stderr)


@pytest.fixture
def recipe(tmp_path, tiny_model, shard_folder) -> Path:
    """A configuration that would train."""
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    tree = {
        "run_dir": str(tmp_path / "run"),
        "num_steps": 2,
        "model": {"path": str(tiny_model), "precision": "float32"},
        "train_data": {"shards": [str(shard_folder)], "slots_per_step": 1, "max_examples": 4, "num_workers": 0},
        "optimizer": {"learning_rate": 1e-4, "warmup_steps": 0},
        "engine": {"deepspeed": str(tmp_path / "ds.json")},
        "evaluation": {"test_sets": {"speech": {"shards": str(shard_folder)}}},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def clip(tmp_path) -> Path:
    soundfile.write(tmp_path / "clip.wav", tone(0.5), 16_000)
    return tmp_path / "clip.wav"


# The installed command, in processes of its own.


def test_the_installed_command_refuses_a_missing_configuration_in_one_sentence(tmp_path):
    assert "nowhere.yaml cannot be read" in run_program("train", "--config", tmp_path / "nowhere.yaml").refusal()


def test_a_run_whose_shards_are_missing_ends_with_one_sentence(recipe, tmp_path):
    override = f"train_data.shards=[{tmp_path / 'nowhere'}]"
    sentence = run_program("train", "--local_rank=0", "--config", recipe, "--set", override).refusal()
    assert f"The shard folder {tmp_path / 'nowhere'} does not exist" in sentence


def test_a_bad_sample_after_a_good_one_is_one_sentence(clip, tmp_path):
    good = {"audio_filepath": clip.name, "text": "good", "lang": "en"}
    manifest = write_lines(tmp_path / "m.jsonl", [good, good | {"audio_filepath": "nowhere.wav"}])
    assert f"{manifest}:2: " in run_program("shards", "pack", manifest, tmp_path / "out").refusal()


# `train`


def test_train_without_a_configuration(run):
    assert "pass `--config FILE`" in run("train").refusal()


@pytest.mark.parametrize("option", ["--config={recipe}", "--local_rank=0 --config {recipe}"])
def test_print_config_prints_what_loads_back(run, recipe, tmp_path, option):
    arguments = option.format(recipe=recipe).split()
    result = run("train", *arguments, "--print-config", "--set", "seed=5", "--set", "optimizer.learning_rate=3e-5")
    assert (result.code, result.err) == (0, "")
    (tmp_path / "printed.yaml").write_text(result.out)
    assert load_config(tmp_path / "printed.yaml") == load_config(recipe, ["seed=5", "optimizer.learning_rate=3e-5"])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train_data.shrads=[x]", "did you mean `shards`?"),
        ("num_steps=-1", "`num_steps`"),
        ("train_data.shards=[{empty}]", "is empty"),
        ("train_data.shards=[{file}]", "does not exist"),
        ("evaluation.test_sets.speech.shards={empty}", "is empty"),
        ("model.path={nowhere}", "nowhere"),
        ("model.path=./nowhere", "nowhere"),
        ("model.path={empty}", "has no tekken.json"),
        ("model.path=nobody/nothing", "nobody/nothing"),
        ("engine.deepspeed={nowhere}", "cannot be read"),
        ("run_dir={file}/run", "`run_dir`"),
        ("train_data.augmentation=[{{name: Gian}}]", "no transform `Gian`"),
        ("train_data.augmentation=[{{name: Gain, arguments: {{loud: 1}}}}]", "`Gain` has no argument `loud`"),
        ("train_data.max_duration_seconds=0.001", "there is nothing to train on"),
    ],
)
def test_a_mistake_in_a_configuration_is_one_sentence(run, recipe, tmp_path, override, sentence):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    places = {name: tmp_path / name for name in ("empty", "file", "nowhere")}
    assert sentence in run("train", "--config", recipe, "--set", override.format(**places)).refusal()


@pytest.mark.parametrize(
    ("contents", "sentence"),
    [
        ('{"train_batch_size": 8, "zero_optimization": {"stage": 2}}', "`train_batch_size`"),
        ('{"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 2}}', "`train_data.max_examples`"),
        ('{"gradient_accumulation_steps": 8, "zero_optimization": {"stage": 2}}', "`train_data.slots_per_step`"),
        ('{"bf16": {"enabled": true}, "zero_optimization": {"stage": 2}}', "`bf16`"),
        ('{"fp16": {"enabled": true}, "zero_optimization": {"stage": 2}}', "`model.precision`"),
        ('{"optimizer": {"type": "Adam"}, "zero_optimization": {"stage": 2}}', "sets `optimizer`"),
        ('{"scheduler": {}, "zero_optimization": {"stage": 2}}', "`optimizer.schedule`"),
        ('{"gradient_clipping": 1.0, "zero_optimization": {"stage": 2}}', "`optimizer.max_grad_norm`"),
        ('{"zero_optimization": {"stage": 4}}', "must be 0, 1, 2 or 3, but is 4 instead"),
        ('{"zero_optimization": {"stage": "3"}}', "must be 0, 1, 2 or 3, but is '3' instead"),
        ('{"zero_optimization": {}}', "must be 0, 1, 2 or 3"),
        ("{}", "must be 0, 1, 2 or 3"),
        ('{"zero_optimization": 3}', "zero_optimization"),
        ('{"zero_optimization": null}', "zero_optimization"),
        ('{"zero_optimization": {"stage": 3, "offload_param": "cpu"}}', "offload_param"),
        ("[]", "must hold a JSON object"),
        ('{"zero_optimization": ', "is not valid JSON"),
        ("", "is not valid JSON"),
        ("\udcff", "ds.json"),
    ],
)
def test_a_deepspeed_file_that_cannot_be_used_is_one_sentence(run, recipe, tmp_path, contents, sentence):
    (tmp_path / "ds.json").write_bytes(contents.encode(errors="surrogateescape"))
    refused = run("train", "--config", recipe).refusal()
    assert sentence in refused
    assert "ds.json" in refused
    assert not (tmp_path / "run").exists(), "nothing of the run was made"


def test_config_check_says_what_each_recipe_does(run, recipe):
    result = run("config", "check", recipe, recipe)
    assert (result.code, result.err) == (0, "")
    assert result.out.count(f"{recipe}: 2 steps of ") == 2
    assert "ZeRO-1" in result.out


def test_config_check_refuses_a_deepspeed_file_that_cannot_be_used(run, recipe, tmp_path):
    (tmp_path / "ds.json").write_text('{"train_batch_size": 8, "zero_optimization": {"stage": 2}}')
    assert "`train_batch_size`" in run("config", "check", recipe).refusal()


def test_config_schema_is_a_json_schema_that_accepts_a_configuration(run, recipe):
    result = run("config", "schema")
    assert (result.code, result.err) == (0, "")
    schema = json.loads(result.out)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load(recipe.read_text()), schema)


# `shards`


def test_shards_pack_says_what_it_packed_and_does_not_overwrite(run, speech_manifest, tmp_path):
    result = run("shards", "pack", speech_manifest, tmp_path / "out", "--workers", 1)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"{tmp_path / 'out'}:\n26 utterances, ")
    assert "en 7" in result.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"index.npy", "shards.json", "out-000000.tar"}
    refused = run("shards", "pack", speech_manifest, tmp_path / "out", "--workers", 1).refusal()
    assert "holds a complete shard set already" in refused


def test_shards_pack_lists_what_it_left_out(run, clip, tmp_path):
    good = {"audio_filepath": clip.name, "text": "good"}
    manifest = write_lines(tmp_path / "m.jsonl", [good, good | {"audio_filepath": "nowhere.wav"}, {"text": "mute"}])
    result = run("shards", "pack", manifest, tmp_path / "out", "--skip-bad", "--workers", 1)
    assert result.code == 0
    assert "left out 2: 1 no audio named, 1 unreadable\n" in result.out
    assert [line.strip().split(": ")[0] for line in result.out.splitlines()[-2:]] == [f"{manifest}:2", f"{manifest}:3"]


def test_every_option_of_shards_pack_reaches_the_packer(run, clip, tmp_path):
    (tmp_path / "t.tsv").write_text(f"file_name\twords\ttongue\n{clip.name}\thello\t\n{clip.name}\tAdieu\tfra\n")
    fields = ["--audio-field", "file_name", "--text-field", "words", "--language-field", "tongue", "--language", "en"]
    shape = ["--format", "tsv", "--encode", "flac", "--name", "said", "--shard-megabytes", 1, "--workers", 1]
    assert run("shards", "pack", tmp_path / "t.tsv", tmp_path / "out", *fields, *shape).code == 0
    shown = [run("shards", "show", tmp_path / "out", f"#{number}").out for number in (0, 1)]
    assert "said-000000.tar" in shown[0]
    assert [line.split()[1] for out in shown for line in out.splitlines() if line.startswith(("text", "lang"))] == [
        "hello",
        "en",
        "Adieu",
        "fr",
    ]
    packed = run("shards", "pack", tmp_path / "out" / "said-000000.tar", tmp_path / "more", "--max-chars-per-second", 1)
    assert packed.code == 0, "short texts are always possible"


def test_shards_index_makes_an_index_of_foreign_tars(run, clip, tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        (tmp_path / "clip.said").write_text("hello")
        tar.add(clip, "clip.wav")
        tar.add(tmp_path / "clip.said", "clip.said")
    options = ["--text-member", "said", "--audio-member", "WAV", "--language", "german", "--workers", 1]
    result = run("shards", "index", tmp_path / "t.tar", tmp_path / "index", *options)
    assert (result.code, result.err) == (0, "")
    assert "1 utterances" in result.out
    assert "languages: de 1" in result.out
    assert "text       hello\nlanguage   de\n" in run("shards", "show", tmp_path / "index", "clip").out
    assert run("shards", "verify", tmp_path / "index", "--workers", 1).code == 0


def test_shards_inspect_shows_each_set(run, shard_folder, tmp_path, speech_manifest):
    other = tmp_path / "other"
    assert run("shards", "pack", speech_manifest, other, "--workers", 1, "--encode", "flac").code == 0
    result = run("shards", "inspect", shard_folder, other)
    assert (result.code, result.err) == (0, "")
    for folder in (shard_folder, other):
        assert f"{folder}: 26 utterances" in result.out
    assert result.out.count("characters a second:") == 2
    assert [line.split()[:2] for line in result.out.splitlines() if line.split()[:1] == ["en"]] == [["en", "7"]] * 2


def test_shards_verify_names_what_is_broken_and_ends_with_1(run, shard_folder, tmp_path):
    folder = shutil.copytree(shard_folder, tmp_path / "broken")
    tar = sorted(folder.glob("*.tar"))[0]
    contents = bytearray(tar.read_bytes())
    contents[:100] = b"?" * 100
    tar.write_bytes(contents)
    result = run("shards", "verify", shard_folder, folder, "--json", tmp_path / "report.json", "--workers", 1)
    assert (result.code, result.err) == (1, "")
    first, last = result.out.splitlines()
    assert first.startswith(f"{folder}: {tar.name}: #0: damaged tar: ")
    assert last == "52 samples were read and decoded, 1 are broken: 1 damaged tar"
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["num_utterances"], report["num_broken"], report["causes"]) == (52, 1, {"damaged tar": 1})
    assert report["broken"][0]["key"] == "#0"
    whole = run("shards", "verify", shard_folder, "--workers", 1)
    assert (whole.code, whole.out) == (0, "26 samples were read and decoded, 0 are broken\n")


def test_shards_show_writes_the_clip_as_it_is_stored_or_as_wav(run, shard_folder, speech_manifest, tmp_path):
    rows = [json.loads(line) for line in speech_manifest.read_text().splitlines()]
    stored = speech_manifest.parent / rows[0]["audio_filepath"]
    result = run("shards", "show", shard_folder, "audio_0_000", "--out", tmp_path)
    assert (result.code, result.err) == (0, "")
    assert rows[0]["text"] in result.out
    assert rows[0]["speaker"] in result.out
    assert (tmp_path / "audio_0_000.flac").read_bytes() == stored.read_bytes()
    assert run("shards", "show", shard_folder, "audio_0_000", "--out", tmp_path / "clip.wav").code == 0
    assert soundfile.info(tmp_path / "clip.wav").format == "WAV"
    assert (soundfile.read(tmp_path / "clip.wav")[0] == soundfile.read(stored)[0]).all()
    assert "must end in .flac" in run("shards", "show", shard_folder, "#0", "--out", tmp_path / "clip.mp3").refusal()
    nowhere = tmp_path / "nowhere" / "clip.wav"
    assert str(nowhere) in run("shards", "show", shard_folder, "#0", "--out", nowhere).refusal()


def test_shards_show_prints_what_the_model_reads_and_learns(run, shard_folder, tiny_model, prompts, recipe):
    result = run("shards", "show", shard_folder, "audio_0_000", "--tokens", "--model", tiny_model)
    assert result.code == 0
    table = result.out.partition("learns to say\n")[2].splitlines()
    completion = prompts.completion("seven green bottles 0")
    learned = [int(line.rpartition("(")[2].rstrip(")")) for line in table if line.endswith(")")]
    assert learned == completion
    assert table[0].split() == ["0", "1", "<s>"]
    assert any("[AUDIO]" in line and " to " in line for line in table)
    # What is learned first is learned at the last token of the prompt.
    first = next(line for line in table if line.endswith(")"))
    assert "[TRANSCRIBE]" in first
    assert f"{len(completion)} targets" in result.out


def test_shards_show_takes_the_prompts_of_a_run(run, shard_folder, recipe, tmp_path):
    tree = yaml.safe_load(recipe.read_text())
    tree["train_data"] |= {"untagged_fraction": 1.0, "target_text": ["lower_case"]}
    (tmp_path / "words.txt").write_text("fährt\n", encoding="utf-8")
    tree["train_data"]["context"] = {"words": str(tmp_path / "words.txt"), "fraction": 1, "true_word_fraction": 1}
    recipe.write_text(yaml.safe_dump(tree))
    result = run("shards", "show", shard_folder, "#1", "--tokens", "--config", recipe)
    assert result.code == 0
    table = result.out.partition("learns to say\n")[2].splitlines()
    pieces = "".join(line.split("'")[1] for line in table if "'" in line)
    assert "Keywords: f" in pieces
    last = [line.rpartition("  ")[2] for line in table if line.endswith(")")]
    learned = "".join(piece.split("'")[1] for piece in last if "'" in piece)
    assert learned.startswith("lang:de")
    assert "Zug" not in learned
    assert "zug" in learned
    # The second set of a run: its samples have other numbers there, and so other draws.
    other = shutil.copytree(shard_folder, tmp_path / "other")
    tree["train_data"] |= {"shards": [str(other), str(shard_folder)], "untagged_fraction": 0.5}
    recipe.write_text(yaml.safe_dump(tree))
    config = load_config(recipe)
    prompting = Prompting(untagged_fraction=0.5)
    for number in range(8):
        shown = run("shards", "show", shard_folder, f"#{number}", "--tokens", "--config", recipe).out
        language = ("en", "de", "fr", None)[number % 4]
        is_told = language is not None and not prompting.is_untagged((config.seed, 0, 26 + number))
        told = shown.partition("[/INST]")[2].partition("[TRANSCRIBE]")[0]
        assert ("':'" in told) == is_told
    tree["train_data"]["shards"] = [str(other)]
    recipe.write_text(yaml.safe_dump(tree))
    refused = run("shards", "show", shard_folder, "#0", "--tokens", "--config", recipe).refusal()
    assert "is not in the shards of the run" in refused
    assert "either `--model PATH` or" in run("shards", "show", shard_folder, "#1", "--tokens").refusal()
    assert "add `--tokens`" in run("shards", "show", shard_folder, "#1", "--config", recipe).refusal()


@pytest.mark.parametrize("by_field", [True, False])
def test_instructions_reach_the_index_by_both_commands(run, clip, tmp_path, by_field):
    row = {"audio_filepath": clip.name, "text": "eins", "lang": "en", "question": "Say it in German."}
    manifest = write_lines(tmp_path / "m.jsonl", [row])
    option = ["--instruction-field", "question"] if by_field else ["--instruction", "Say it in German."]
    assert run("shards", "pack", manifest, tmp_path / "packed", *option).code == 0
    assert run("shards", "pack", manifest, tmp_path / "foreign").code == 0
    for file in ("index.npy", "shards.json"):
        (tmp_path / "foreign" / file).unlink()
    assert run("shards", "index", tmp_path / "foreign", *option).code == 0
    for folder in ("packed", "foreign"):
        shown = run("shards", "show", tmp_path / folder, "#0").out
        assert "instruction Say it in German." in shown
        assert int(read_index([str(tmp_path / folder)]).record(0)["num_instruction_tokens"]) > 0
    # The answers are never taken for transcripts.
    again = ("shards", "pack", tmp_path / "packed", tmp_path / "again")
    assert "are answers to instructions" in run(*again).refusal()
    assert run(*again, "--instruction-field", "instruction").code == 0
    assert "instruction Say it in German." in run("shards", "show", tmp_path / "again", "#0").out
    # An index that does not fit, or cannot be read, is nothing that packing needs.
    for damage in ('{"format": 1}', "no json"):
        (tmp_path / "foreign" / "shards.json").write_text(damage)
        assert run("shards", "pack", tmp_path / "foreign", tmp_path / f"of {len(damage)}").code == 0
    both = ["--instruction", "a", "--instruction-field", "b"]
    assert "exclude each other" in run("shards", "pack", manifest, tmp_path / "x", *both).refusal()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("pack", "{nowhere}", "{out}"), "does not exist"),
        (("pack", "{nowhere}/*.tar", "{out}"), "tar"),
        (("pack", "{nowhere}", "{out}", "--format", "folder"), "does not exist"),
        (("pack", "{nowhere}", "{out}", "--format", "huggingface"), "cannot be opened"),
        (("pack", "{empty}", "{out}"), "holds no audio files"),
        (("pack", "{shards}", "{out}", "--language", "klingon"), "`--language` has the language 'klingon'"),
        (("pack", "{shards}", "{out}", "--text-member", "json"), "`--text-member` must say which key"),
        (("pack", "{shards}", "{out}", "--name", "a/b"), "`--name` must be the beginning of file names"),
        (("index", "{empty}"), "There are no tars in"),
        (("index", "{nowhere}"), "cannot be listed"),
        (("index", "{shards}", "--language", "en", "--language-field", "lang"), "exclude each other"),
        (("index", "{shards}", "{file}"), "cannot be written into"),
        (("inspect", "{empty}"), "is empty"),
        (("verify", "{nowhere}"), "does not exist"),
        (("verify", "{shards}", "--json", "{nowhere}/report.json"), "cannot be written"),
        (("show", "{shards}", "zzz"), "has the key 'zzz'"),
        (("show", "{empty}", "zzz"), "is empty"),
    ],
)
def test_a_mistake_about_shards_is_one_sentence(run, shard_folder, tmp_path, arguments, sentence):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    places = {name: tmp_path / name for name in ("empty", "file", "nowhere", "out")} | {"shards": shard_folder}
    filled = [part.format(**places) for part in arguments]
    result = run("shards", *filled, *(["--workers", 1] if filled[0] not in ("inspect", "show") else []))
    assert sentence in result.refusal()


@pytest.mark.parametrize("command", [("shards", "pack", "{manifest}", "{file}"), ("tiny", "{file}")])
def test_a_file_where_a_folder_is_to_be_made_is_refused(run, speech_manifest, tmp_path, command):
    (tmp_path / "file").touch()
    arguments = [part.format(manifest=speech_manifest, file=tmp_path / "file") for part in command]
    assert str(tmp_path / "file") in run(*arguments).refusal()


# `transcribe` and `evaluate`


def test_transcribe_prints_each_clip_with_its_transcript(run, tiny_model, clip):
    result = run("transcribe", tiny_model, clip, clip, "--language", "en")
    assert result.code == 0
    # A model with random weights may say anything, but of one clip twice the same.
    first, second = result.out.split(f"{clip}\t")[1:]
    assert first == second


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("{folder}/nowhere.wav",), "nowhere.wav cannot be read: No such file"),
        (("{folder}/empty",), "empty holds no audio: none of its files ends with one of"),
        (("{folder}/notes.txt",), "notes.txt does not decode"),
        (("{folder}/" + 300 * "a" + ".wav",), "cannot be read: File name too long"),
        (("{folder}/clip.wav", "{folder}/clip.wav", "--out", "{folder}/out"), "folders of their own"),
        (("{folder}/clip.wav", "--format", "srt"), "name their folder by `--out`"),
        (("{folder}/clip.wav", "--out", "{folder}/notes.txt"), "`--out`: "),
        (("{folder}/clip.wav", "--instruction", "What?", "--max-segment-seconds", "5"), "asks about whole clips"),
        (("{folder}/clip.wav", "--language", "klingon"), "'klingon', which is not an ISO 639-1 code"),
    ],
)
def test_a_clip_that_cannot_be_transcribed_is_one_sentence(run, tiny_model, clip, arguments, sentence):
    (clip.parent / "notes.txt").write_text("no audio\n")
    (clip.parent / "empty").mkdir(exist_ok=True)
    refused = run("transcribe", tiny_model, *(argument.format(folder=clip.parent) for argument in arguments)).refusal()
    assert sentence in refused
    assert " at 0x" not in refused


def test_options_of_decoding_reach_the_model(run, tiny_model, clip, monkeypatch):
    generate, asked = VoxtralForConditionalGeneration.generate, []

    def recorded(model, **settings):
        asked.append((settings["num_beams"], settings.get("cache_implementation")))
        return generate(model, **settings)

    monkeypatch.setattr(VoxtralForConditionalGeneration, "generate", recorded)

    def segment(*options: str) -> dict[str, Any]:
        (only,) = json.loads(run("transcribe", tiny_model, clip, "--json", *options).out)["segments"]
        return only

    usual = segment()
    limited = segment("--max-tokens-per-second", "1")
    limit = 16 + math.ceil(usual["end_seconds"])
    assert limited["hit_limit"]
    assert limited["num_tokens"] == limit < usual["num_tokens"]
    assert segment("--static-cache", "--max-windows", "1") == usual
    segment("--beams", "3")
    assert asked == [(1, None), (1, None), (1, "static"), (3, None)]


def test_a_gpu_without_room_is_one_sentence(run, tiny_model, clip, shard_folder, tmp_path, monkeypatch):
    asked = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 24 GiB of which 12 MiB is free"
    )

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError(f"{asked}. Including non-PyTorch memory, this process has 23.66 GiB in use.\nMore")

    monkeypatch.setattr(VoxtralForConditionalGeneration, "generate", full)
    in_transcribe = run("transcribe", tiny_model, clip).refusal(3)
    assert f"Rank 0 ran out of the memory of its GPU ({asked}): take less at a time" in in_transcribe
    in_evaluate = run("evaluate", tiny_model, shard_folder, "--out", tmp_path / "out").refusal(3)
    assert "The evaluation of `speech` ended on rank 0: the memory of its GPU does not suffice" in in_evaluate
    assert f"({asked}): lower `batch_size`" in in_evaluate


def test_transcribe_takes_context_or_an_instruction_and_writes_json(run, tiny_model, clip):
    (clip.parent / "words.txt").write_text("Siobhan\nXiaomi\n")
    contexts = ["--words", clip.parent / "words.txt", "--previous-text", "what was said"]
    for asked in (contexts, ["--instruction", "What is this?"], []):
        result = run("transcribe", tiny_model, clip, "--json", *asked)
        assert result.code == 0
        row = json.loads(result.out)
        assert row.keys() == {"clip", "text", "detected_language", "segments"}
        assert row["clip"] == str(clip)
    refused = run("transcribe", tiny_model, clip, "--instruction", "What?", "--language", "en").refusal()
    assert "`--instruction` asks something else than a transcript" in refused
    assert "`--words`: " in run("transcribe", tiny_model, clip, "--words", clip.parent / "nowhere.txt").refusal()


def test_a_clip_that_cannot_be_transcribed_does_not_keep_the_others_from_it(run, tiny_model, clip, tmp_path):
    (tmp_path / "notes.txt").write_text("no audio\n")
    result = run("transcribe", tiny_model, clip, tmp_path / "notes.txt", clip)
    assert result.code == 2
    assert result.out.count(f"{clip}\t") == 2
    assert "notes.txt does not decode" in result.err
    assert "1 of 3 clips could not be transcribed" in result.err


def test_a_clip_that_is_longer_than_the_model_has_positions_is_cut_unless_a_question_is_about_it(run, tmp_path):
    # 512 positions: 12.5 a second for the audio, and as many for the transcript.
    model, path = tmp_path / "model", tmp_path / "long.flac"
    build_tiny_voxtral(model, replace(TINY_SHAPE, max_text_positions=512))
    soundfile.write(path, np.tile(tone(10.0), 5), 16_000)
    row = json.loads(run("transcribe", model, path, "--json").out)
    ends = [segment["end_seconds"] for segment in row["segments"]]
    assert ends[-1] == 50.0
    assert [0.0, *ends[:-1]] == [segment["start_seconds"] for segment in row["segments"]]
    assert len(ends) > 1
    crowded = run("transcribe", model, path, "--max-tokens-per-second", "5000").refusal()
    assert "leaves no room for 1.28 s of audio with 5000 tokens a second" in crowded
    refused = run("transcribe", model, path, "--instruction", "What?").refusal()
    assert "long.flac lasts 50 s, and the model has room for 19 s" in refused


def test_ranks_share_clips_and_one_that_is_broken_ends_none_of_them(tiny_model, clip, tmp_path):
    clips = [tmp_path / f"{number}.wav" for number in range(5)]
    for path in clips:
        shutil.copy(clip, path)
    # The first of the second rank, which would be done long before the first one.
    clips[1].write_bytes(b"no audio")
    command = [PROGRAM.with_name("torchrun"), "--standalone", "--nproc-per-node=2", "--no-python", PROGRAM]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [*command, "transcribe", tiny_model, *clips, "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
        check=False,
    )
    assert ended.returncode != 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.txt", "2.txt", "3.txt", "4.txt"]
    assert ended.stderr.count("1.wav does not decode") == 1
    assert ended.stderr.count("1 of 5 clips could not be transcribed; above it says why") == 1


def test_batches_of_clips_keep_within_their_windows(tiny_model, clip, tmp_path):
    soundfile.write(tmp_path / "long.wav", tone(3.0), 16_000)
    (tmp_path / "broken.wav").write_bytes(b"no audio")
    soundfile.write(tmp_path / "silent.wav", np.zeros(16_000, dtype=np.int16), 16_000)
    settings = EvaluationConfig(batch_size=3, max_windows=4)
    transcriber = ClipTranscriber(
        str(tiny_model), Question("en"), settings, "auto", World(0, 1, 0, torch.device("cpu"))
    )
    decode, asked = transcriber._transcriber, []

    def recorded(examples):
        asked.append([example.num_windows for example in examples])
        return decode(examples)

    transcriber._transcriber = recorded
    names = ("silent", "short", "long", "broken", "long", "short", "short", "short", "short", "silent")
    clips = [clip if name == "short" else tmp_path / f"{name}.wav" for name in names]
    found = list(transcriber(clips))
    assert [path for path, _ in found] == clips
    assert [isinstance(result, ClipError) for _, result in found] == [name == "broken" for name in names]
    assert asked == [[1, 3], [3, 1], [1, 1, 1]]


def test_transcribe_writes_files_for_a_folder(run, tiny_model, clip, tmp_path):
    recordings = tmp_path / "recordings"
    (recordings / "monday").mkdir(parents=True)
    shutil.copy(clip, recordings / "monday" / "first.wav")
    speech = np.concatenate([tone(3.0), np.zeros(16_000, dtype=np.int16), tone(3.0, seed=1)])
    soundfile.write(recordings / "second.flac", speech, 16_000)
    asked = ["--out", tmp_path / "out", "--format", "txt", "json", "srt", "--max-segment-seconds", "5"]
    assert run("transcribe", tiny_model, recordings, "--language", "en", *asked).code == 0
    written = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    assert written == [f"{name}.{suffix}" for name in ("monday/first", "second") for suffix in ("json", "srt", "txt")]
    row = json.loads((tmp_path / "out" / "second.json").read_text(encoding="utf-8"))
    first, second = row["segments"]
    assert 3.0 < first["end_seconds"] == second["start_seconds"] < 4.0, "cut in the pause"
    assert (tmp_path / "out" / "second.txt").read_text(encoding="utf-8") == f"{row['text']}\n"
    cue = f"2\n00:00:0{second['start_seconds']:.3f}".replace(".", ",") + " --> 00:00:07,000\n"
    assert cue in (tmp_path / "out" / "second.srt").read_text(encoding="utf-8")
    # What was written before is replaced, but never what lies beside a clip: a human may have written it.
    assert run("transcribe", tiny_model, recordings, "--language", "en", *asked).code == 0
    (recordings / "second.txt").write_text("What was truly said.\n", encoding="utf-8")
    refused = run("transcribe", tiny_model, recordings, "--out", recordings).refusal()
    assert f"{recordings / 'second.txt'} lies beside a clip and would be replaced" in refused
    assert (recordings / "second.txt").read_text(encoding="utf-8") == "What was truly said.\n"
    assert not (recordings / "monday" / "first.txt").exists(), "nothing was decoded before"
    assert run("transcribe", tiny_model, recordings, "--out", recordings, "--format", "json").code == 0
    # Beside whichever clip, by whichever way it is named.
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "second.flac").symlink_to(recordings / "second.flac")
    asked = [tmp_path / "linked", recordings / "monday" / "first.wav", "--out", recordings]
    assert "second.txt lies beside a clip" in run("transcribe", tiny_model, *asked).refusal()
    assert (recordings / "second.txt").read_text(encoding="utf-8") == "What was truly said.\n"


def test_a_folder_with_the_name_of_a_clip_is_none(run, tiny_model, clip, tmp_path):
    (tmp_path / "recordings" / "archive.wav").mkdir(parents=True)
    shutil.copy(clip, tmp_path / "recordings" / "first.wav")
    result = run("transcribe", tiny_model, tmp_path / "recordings")
    assert (result.code, result.err) == (0, "")
    # But a link that leads nowhere is a clip that somebody misses.
    (tmp_path / "recordings" / "gone.wav").symlink_to(tmp_path / "nowhere.wav")
    result = run("transcribe", tiny_model, tmp_path / "recordings")
    assert result.code == 2
    assert "gone.wav cannot be read: No such file" in result.err


def test_the_name_of_a_clip_may_be_as_long_as_that_of_its_transcript_can_be(run, tiny_model, clip, tmp_path):
    long = clip.rename(clip.with_name(251 * "a" + ".wav"))
    assert run("transcribe", tiny_model, long, "--out", tmp_path / "out").code == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == [251 * "a" + ".txt"]
    refused = run("transcribe", tiny_model, long, "--out", tmp_path / "out", "--format", "json").refusal()
    assert "is longer than 255 bytes: rename the clip" in refused


def test_a_transcript_that_cannot_be_written_does_not_keep_the_others_from_it(run, tiny_model, clip, tmp_path):
    shutil.copy(clip, tmp_path / "first.wav")
    shutil.copy(clip, tmp_path / "second.wav")
    (tmp_path / "out" / "first.txt").mkdir(parents=True)
    result = run("transcribe", tiny_model, tmp_path / "first.wav", tmp_path / "second.wav", "--out", tmp_path / "out")
    assert result.code == 2
    assert "first cannot be written: Is a directory" in result.err
    assert "1 of 2 clips could not be transcribed" in result.err
    assert len(result.out.splitlines()) == 2, "what was decoded is printed"
    assert (tmp_path / "out" / "second.txt").is_file()


def test_a_text_ends_no_cue_of_subtitles():
    segment = Segment(0.0, 1.5, "one\n\n2\n00:00:00,000 --> 00:00:09,000\ntwo")
    assert to_srt(ClipTranscript((segment, Segment(1.5, 2.0, "")))) == (
        "1\n00:00:00,000 --> 00:00:01,500\none 2 00:00:00,000 --> 00:00:09,000 two\n\n"
    )


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("file", "spoil"),
    [
        ("model.safetensors", Path.unlink),
        ("model.safetensors", cut),
        ("config.json", Path.unlink),
        ("config.json", cut),
        ("preprocessor_config.json", Path.unlink),
        ("tekken.json", Path.unlink),
        ("tekken.json", cut),
    ],
)
@pytest.mark.parametrize("command", ["transcribe", "train"])
def test_a_damaged_model_folder_is_one_sentence(run, tiny_model, clip, recipe, tmp_path, file, spoil, command):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    spoil(folder / file)
    arguments = [folder, clip] if command == "transcribe" else ["--config", recipe, "--set", f"model.path={folder}"]
    assert str(folder) in run(command, *arguments).refusal()


@pytest.mark.parametrize("command", ["transcribe", "train"])
def test_the_configuration_of_another_model_is_refused_before_it_is_built(
    run, tiny_model, clip, recipe, tmp_path, monkeypatch, command
):
    """Without Voxtral's own keys, transformers builds its default: 4.68 billion parameters."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(VoxtralForConditionalGeneration, "__init__", never)
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config["text_config"]))
    arguments = [folder, clip] if command == "transcribe" else ["--config", recipe, "--set", f"model.path={folder}"]
    assert str(folder) in run(command, *arguments).refusal()


@pytest.mark.parametrize("model", ["{folder}/nowhere", "./nowhere", "nobody/nothing"])
def test_a_missing_model_is_one_sentence(run, clip, model):
    path = model.format(folder=clip.parent)
    assert path in run("transcribe", path, clip).refusal()


def test_evaluate_detects_languages_and_takes_lists_of_words(run, tiny_model, shard_folder, tmp_path):
    (tmp_path / "words.txt").write_text("bottles\nGenève\nXiaomi\nSiobhan\n", encoding="utf-8")
    options = ["--words", tmp_path / "words.txt", "--distractors", "0", "2", "--detect-language"]
    steps = ["--target-text", "lower_case", "--normalizer", "none"]
    result = run("evaluate", tiny_model, shard_folder, "--out", tmp_path / "out", *options, *steps)
    assert (result.code, len(result.out.splitlines())) == (0, 3)
    for name, size in (("speech", None), ("speech-distractors-0", 0), ("speech-distractors-2", 2)):
        score = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        rows = [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
        assert score["normalizer"] == "lower_case+none-1"
        assert score["biased"]["num_distractors"] == size
        # Of 26 utterances, seven have bottles, six have Genève, and six are of unknown language.
        assert score["biased"]["biased_words"]["reference_length"] == 13
        assert score["language_identification"]["num_utterances"] == 20
        assert len(rows) == 26
        assert all(row["asks_for_language"] and "lang:" not in row["hypothesis"] for row in rows)
        for row in rows:
            listed = row["context"].removeprefix("Keywords: ").split(", ") if row["context"] else []
            true = {"bottles", "Genève"} & set(row["reference"].replace(",", "").split())
            assert len(listed) == (0 if size is None else size + len(true))
            assert size is None or true <= set(listed)
    assert "name its file by `--words`" in run("evaluate", tiny_model, shard_folder, "--distractors", "3").refusal()


def test_evaluate_replaces_its_own_results_alone(run, tiny_model, clip, tmp_path):
    manifest = write_lines(clip.parent / "short.jsonl", [{"audio_filepath": clip.name, "text": "a", "lang": "en"}])
    shards = clip.parent / "short"
    assert run("shards", "pack", manifest, shards).code == 0
    before = manifest.read_bytes()
    refused = run("evaluate", tiny_model, shards, "--out", clip.parent).refusal()
    assert f"`--out`: {manifest} would be replaced, and is not known to be a result" in refused
    assert manifest.read_bytes() == before
    options = ["--out", tmp_path / "out", "--max-tokens-per-second", "1"]
    for _ in range(2):
        assert run("evaluate", tiny_model, shards, *options).code == 0
    # One of two that an interrupted writing left is known for a result too.
    (tmp_path / "out" / "short.json").unlink()
    assert run("evaluate", tiny_model, shards, *options).code == 0
    long = shards.rename(shards.with_name(250 * "a"))
    assert "cannot be written: File name too long" in run("evaluate", tiny_model, long, "--out", tmp_path).refusal()
    assert "`--words`: " in run("evaluate", tiny_model, long, "--words", tmp_path / "nowhere.txt").refusal()


def test_a_field_that_no_utterance_has_is_told(run, tiny_model, shard_folder, tmp_path, caplog):
    options = ["--slices", "nosuch", "language", "--max-tokens-per-second", "1", "--out", tmp_path / "out"]
    assert run("evaluate", tiny_model, shard_folder, *options).code == 0
    assert caplog.messages == ["No utterance of `speech` has the field `nosuch`, which slices or intervals ask for."]


def test_results_that_cannot_be_written_after_all_are_one_sentence(
    run, tiny_model, shard_folder, tmp_path, monkeypatch
):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("voxtral_dist.evaluation.test_sets.write_results", full)
    options = ["--max-tokens-per-second", "1", "--out", tmp_path / "out"]
    refused = run("evaluate", tiny_model, shard_folder, *options).refusal(3)
    assert "The results of `speech` cannot be written to" in refused
    assert "No space left on device" in refused


def test_the_loss_is_that_of_the_targets_that_the_steps_make(run, tiny_model, clip, tmp_path):
    losses = {}
    for name, text in (("loud", "ONE TWO, three"), ("quiet", "one two, three")):
        rows = [{"audio_filepath": clip.name, "text": text, "lang": "en"}]
        manifest = write_lines(clip.parent / f"{name}.jsonl", rows)
        assert run("shards", "pack", manifest, tmp_path / name).code == 0
        for steps in ((), ("--target-text", "lower_case")):
            assert run("evaluate", tiny_model, tmp_path / name, "--out", tmp_path / "out", *steps).code == 0
            losses[name, steps != ()] = json.loads((tmp_path / "out" / f"{name}.json").read_text())["loss"]
        # The stored text is what is compared, and what is written.
        assert json.loads((tmp_path / "out" / f"{name}.jsonl").read_text())["reference"] == text
    assert losses["loud", True] == losses["quiet", True] == losses["quiet", False] != losses["loud", False]


@pytest.mark.parametrize(
    ("test_sets", "sentence"),
    [
        (
            {"a": {"context": {"num_distractors": [2]}}, "a-distractors-2": {}},
            "the name `a-distractors-2` is that of a",
        ),
        ({"a": {"context": {"num_distractors": [3000]}}}, "3000 words may take"),
    ],
)
def test_lists_of_words_that_cannot_be_are_refused_at_the_start(
    run, recipe, shard_folder, tmp_path, test_sets, sentence
):
    (tmp_path / "words.txt").write_text("".join(f"word{number}\n" for number in range(3000)))
    for one in test_sets.values():
        one["shards"] = str(shard_folder)
        if "context" in one:
            one["context"]["words"] = str(tmp_path / "words.txt")
    tree = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump(tree | {"evaluation": {"test_sets": test_sets}}))
    assert sentence in run("train", "--config", recipe).refusal()


def test_answers_have_no_lists_and_no_language_to_detect(run, tiny_model, clip, tmp_path):
    manifest = write_lines(tmp_path / "m.jsonl", [{"audio_filepath": clip.name, "text": "Yes.", "lang": "en"}])
    assert run("shards", "pack", manifest, tmp_path / "set", "--instruction", "Is it loud?").code == 0
    result = run("evaluate", tiny_model, tmp_path / "set", "--out", tmp_path / "out", "--target-text", "lower_case")
    assert "normalizer basic-2" in result.out
    refused = run("evaluate", tiny_model, tmp_path / "set", "--detect-language").refusal()
    assert "its texts are answers to instructions" in refused


def test_a_test_set_with_an_utterance_beyond_the_models_positions_is_refused(run, tiny_model, tmp_path):
    soundfile.write(tmp_path / "long.flac", np.tile(tone(10.0), 33), 16_000)
    rows = [{"audio_filepath": "long.flac", "text": "one two", "lang": "en"}]
    assert run("shards", "pack", write_lines(tmp_path / "m.jsonl", rows), tmp_path / "set").code == 0
    refused = run("evaluate", tiny_model, tmp_path / "set", "--out", tmp_path / "out").refusal()
    assert "1 utterances take more positions than the 4096 of the model, the longest (#0, 330 s) 41" in refused


def test_evaluate_measures_each_folder_or_refuses(run, tiny_model, clip, tmp_path):
    row = {"audio_filepath": clip.name, "text": "One two.", "lang": "en", "speaker": "x"}
    manifest = write_lines(tmp_path / "m.jsonl", [row | {"domain": "news"}, row])
    folders = [tmp_path / parent / "test" for parent in ("first", "second")]
    for folder in folders:
        assert run("shards", "pack", manifest, folder).code == 0
    options = ["--normalizer", "whisper_basic", "--slices", "domain"]
    result = run("evaluate", tiny_model, folders[0], "--out", tmp_path / "out", *options)
    assert result.code == 0
    assert result.out.startswith("test: WER ")
    assert "2 utterances, normalizer whisper_basic-transformers-" in result.out
    score = json.loads((tmp_path / "out" / "test.json").read_text())
    assert score["num_utterances"] == 2
    assert score["rtfx"] == pytest.approx(score["audio_seconds"] / score["decode_seconds"])
    assert score["perplexity"] == pytest.approx(math.exp(score["loss"]))
    assert {label: part["num_utterances"] for label, part in score["slices"]["domain"].items()} == {
        "news": 1,
        "unknown": 1,
    }
    rows = [json.loads(line) for line in (tmp_path / "out" / "test.jsonl").read_text().splitlines()]
    assert [row["fields"] for row in rows] == [{"domain": "news", "speaker": "x"}, {"speaker": "x"}]
    # What it wrote is scored without the model, to the same numbers.
    assert run("score", tmp_path / "out" / "test.jsonl", "--out", tmp_path / "again", *options).code == 0
    by_the_model = dict.fromkeys(("decode_seconds", "rtfx", "loss", "perplexity"))
    assert json.loads((tmp_path / "again" / "test.json").read_text()) == score | by_the_model
    refused = run("evaluate", tiny_model, folders[0], "--out", manifest).refusal()
    assert f"`--out`: {manifest} cannot be made" in refused, "before anything is decoded"
    # Both would be written to test.json: neither may be lost in silence.
    assert "same name" in run("evaluate", tiny_model, *folders, "--out", tmp_path / "both").refusal()


@pytest.mark.parametrize("batch_size", ["0", "-1", "many"])
def test_arguments_out_of_range_are_refused_by_the_grammar(run, tiny_model, shard_folder, batch_size):
    result = run("evaluate", tiny_model, shard_folder, "--batch-size", batch_size)
    assert result.code == 2
    assert "--batch-size" in result.err
    assert "Traceback" not in result.err


def test_tiny_makes_a_folder_that_transcribes(run, clip, tmp_path):
    sizes = ["encoder_layers=1", "text_layers=1", "window_seconds=0.64"]
    result = run("tiny", tmp_path / "model", *(part for size in sizes for part in ("--set", size)))
    assert (result.code, result.out) == (0, f"{tmp_path / 'model'}: a tiny Voxtral with random weights\n")
    assert run("transcribe", tmp_path / "model", clip).code == 0


def test_of_several_ranks_of_a_node_one_speaks(run, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    result = run("train", "--config", tmp_path / "nowhere.yaml")
    assert (result.code, result.out, result.err) == (2, "", "")
