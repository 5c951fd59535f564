"""The model folders that commands make, read and refuse."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import VoxtralForConditionalGeneration


def test_tiny_makes_a_folder_that_transcribes(run, clip, tmp_path):
    sizes = ["encoder_layers=1", "text_layers=1", "window_seconds=0.64"]
    result = run("tiny", tmp_path / "model", *(part for size in sizes for part in ("--set", size)))
    assert (result.code, result.out) == (0, f"{tmp_path / 'model'}: a tiny Voxtral with random weights\n")
    assert run("transcribe", tmp_path / "model", clip).code == 0


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
