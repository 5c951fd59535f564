"""`voxtral-dist export` writes from a run what the run wrote itself, and adapters have names that vLLM knows."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import Tensor

from voxtral_dist.checkpoints.complete import read_complete
from voxtral_dist.checkpoints.files import read_states
from voxtral_dist.checkpoints.loading import checkpoint_weights
from voxtral_dist.config import LoraConfig
from voxtral_dist.data.stored.index import read_index
from voxtral_dist.errors import UserError
from voxtral_dist.exports.adapter_folders import refuse_without_effect, vllm_name, vllm_refusal

from corpora import TINY_SHAPE
from hub_server import HubServer
from runs import run_config, train_as_users_do
from vllm_names import vllm_adapter_module, vllm_parameters

NUM_BLOCKS = 2
VLLM_MODULES = {name.removesuffix(".weight") for name in vllm_parameters(0, NUM_BLOCKS) if "_proj" in name}
RANK, ALPHA = 3, 5


@pytest.fixture(scope="module")
def lora_run(tiny_model: Path, shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with adapters in the language model, in float32, and averages of them."""
    run_dir = tmp_path_factory.mktemp("runs") / "lora"
    lora = {"rank": RANK, "alpha": ALPHA, "targets": {"language_model": ["q_proj", "k_proj", "down_proj"]}}
    optimizer = {"learning_rate": 2e-3, "warmup_steps": 2, "ema_decay": 0.5}
    evaluation = {
        "test_sets": {"speech": {"shards": str(shard_folder), "max_utterances": 3}},
        "max_tokens_per_second": 1,
    }
    sections = {"engine": {"fsdp2": {}}, "trainable": {"lora": lora}, "optimizer": optimizer, "evaluation": evaluation}
    config = run_config(run_dir, tiny_model, shard_folder, num_steps=3, **sections)
    assert train_as_users_do(config, 1).code == 0
    return run_dir


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


@pytest.mark.parametrize(
    ("layout", "name"),
    [("hf", "export"), ("mistral", "export-mistral"), ("peft", "adapter"), ("vllm-lora", "adapter-vllm")],
)
def test_an_export_of_the_run_is_what_the_run_wrote(
    run, lora_run: Path, layout: str, name: str, tmp_path: Path
) -> None:
    result = run("export", lora_run, tmp_path / "out", "--layout", layout)
    assert (result.code, result.err) == (0, "")
    own, written = lora_run / name, tmp_path / "out"
    assert {path.name for path in written.iterdir()} == {path.name for path in own.iterdir()}
    theirs = tensors(own)
    assert theirs.keys() == tensors(written).keys()
    for tensor, value in tensors(written).items():
        assert torch.equal(value, theirs[tensor]), tensor
    for path in (*own.glob("*.json"), own / "README.md"):
        assert (written / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_card_of_a_run_has_its_results_and_its_data(lora_run: Path, shard_folder: Path) -> None:
    text = (lora_run / "export" / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    score = json.loads((lora_run / "evaluations" / "step-0000003" / "speech.json").read_text())
    rates = {(one.dataset_name, one.metric_type, one.metric_name): one.metric_value for one in card.data.eval_results}
    assert rates["speech", "wer", "WER, in %"] == round(100 * score["wer"], 2)
    seconds = json.loads((shard_folder / "shards.json").read_text())["duration_seconds"]
    assert f"Audio: {seconds:.1f} s in {len(read_index([shard_folder]))} utterances" in text
    assert "Engine: FSDP2 on 1 × CPU" in text
    assert f"torch {torch.__version__.partition('+')[0]}" in text
    assert str(lora_run.parent) not in text
    assert str(shard_folder) not in text
    adapters = ModelCard((lora_run / "adapter-vllm" / "README.md").read_text(encoding="utf-8"))
    assert adapters.data.eval_results == card.data.eval_results


@pytest.mark.parametrize(
    ("layout", "folder"), [("hf", "export"), pytest.param("peft", "adapter", marks=pytest.mark.slow)]
)
def test_the_example_for_transformers_in_a_card_transcribes(
    lora_run: Path, tiny_model: Path, clip: Path, layout: str, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (lora_run / folder / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    known = {"FOLDER": lora_run / folder, "BASE": tiny_model, "clip.wav": clip, "4096": 4, "bfloat16": "float32"}
    # The processor cannot know that the tiny model has smaller windows than the published ones.
    samples = round(16_000 * TINY_SHAPE.window_seconds)
    known["language="] = f"pad_to_multiple_of={samples}, max_source_positions={samples // 160}, language="
    for word, value in known.items():
        example = example.replace(word, str(value))
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["ids"].shape[1] - names["inputs"].input_ids.shape[1] in range(1, 5)
    assert capsys.readouterr().out.endswith("\n")


def test_a_run_is_pushed_with_its_card(run, lora_run: Path, hub: HubServer, tmp_path: Path) -> None:
    result = run("export", lora_run, tmp_path / "out", "--push", "someone/tuned", "--license", "mit")
    assert (result.code, result.out.splitlines()[-1]) == (0, f"pushed: {hub.url}/someone/tuned (private)")
    pushed = hub.repositories["someone/tuned"]
    assert pushed.is_private
    assert pushed.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} | {
        ".gitattributes": b""
    }
    card = ModelCard(pushed.files["README.md"].decode())
    assert (card.data.license, card.data.model_name) == ("mit", "tuned")
    assert 'from_pretrained("someone/tuned")' in card.text


def test_pushed_adapters_name_their_base_model(run, lora_run: Path, hub: HubServer, tmp_path: Path) -> None:
    push = ("export", lora_run, tmp_path / "out", "--layout", "peft", "--push", "someone/adapters")
    assert "add `--base-model USER/NAME`" in run(*push).refusal()
    assert (hub.repositories, (tmp_path / "out").exists()) == ({}, False)
    base = "mistralai/Voxtral-Mini-3B-2507"
    assert run(*push, "--base-model", base).code == 0
    files = hub.repositories["someone/adapters"].files
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == base
    assert ModelCard(files["README.md"].decode()).data.base_model == base
    assert not any(str(tmp_path.parent).encode() in contents for contents in files.values())


def test_an_export_of_a_runs_export_has_the_card_of_the_run(
    run, lora_run: Path, tiny_model: Path, tmp_path: Path
) -> None:
    assert run("export", lora_run / "export", tmp_path / "native", "--layout", "mistral").code == 0
    assert (tmp_path / "native" / "README.md").read_text() == (lora_run / "export-mistral" / "README.md").read_text()
    assert run("export", tiny_model, tmp_path / "other").code == 0
    assert "training data and error rates are not stated here" in (tmp_path / "other" / "README.md").read_text()


def test_a_folder_with_other_files_is_never_replaced(run, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    assert "is not an export" in run("export", tiny_model, tmp_path).refusal()
    # Many folders that are no models have a file of this name, and people keep notes beside models.
    (tmp_path / "config.json").write_text("{}")
    assert "is not an export" in run("export", tiny_model, tmp_path).refusal()
    (tmp_path / "model.safetensors").touch()
    assert "is not an export" in run("export", tiny_model, tmp_path).refusal()
    assert "is not an export" in run("export", tiny_model, tmp_path / "thesis.tex").refusal()
    assert (tmp_path / "thesis.tex").read_text() == "years"
    assert "add `--push USER/NAME`" in run("export", tiny_model, tmp_path / "out", "--public").refusal()


def test_averages_and_weights_of_a_checkpoint_are_exported_on_demand(run, lora_run: Path, tmp_path: Path) -> None:
    exported = {}
    for option in ("--ema", "--no-ema"):
        assert run("export", lora_run, tmp_path / "out", "--layout", "peft", option).code == 0
        exported[option] = tensors(tmp_path / "out")
    own = tensors(lora_run / "adapter")
    assert all(torch.equal(value, own[name]) for name, value in exported["--ema"].items())
    checkpoint = lora_run / "checkpoints" / "step-0000003"
    states = read_states(checkpoint, read_complete(checkpoint))
    of_step = {state.name.replace(".default.", "."): state.weight for state in states}
    for name, value in exported["--no-ema"].items():
        (stored,) = (one for key, one in of_step.items() if name.endswith(key.removeprefix("model.")))
        assert torch.equal(value, stored), name
        assert not torch.equal(value, own[name]), name


def test_adapters_for_vllm_have_its_names_and_make_the_merged_model(lora_run: Path, tiny_model: Path) -> None:
    adapter = tensors(lora_run / "adapter-vllm")
    assert adapter
    assert {vllm_adapter_module(name) for name in adapter} <= VLLM_MODULES
    # It would leave out those of peft's file without a word.
    assert not {vllm_adapter_module(name) for name in tensors(lora_run / "adapter")} & VLLM_MODULES
    described = json.loads((lora_run / "adapter-vllm" / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"], described["use_dora"]) == (RANK, ALPHA, False)
    assert described["modules_to_save"] is None
    assert set(described["target_modules"]) == {"q_proj", "k_proj", "down_proj"}
    base, merged = load_file(tiny_model / "model.safetensors"), tensors(lora_run / "export")
    changed = {name for name, value in merged.items() if not torch.equal(value, base[name])}
    adapted = {name.removesuffix(".lora_A.weight") for name in adapter if ".lora_A." in name}
    assert {f"base_model.model.{name.removesuffix('.weight')}" for name in changed} == adapted
    for name in changed:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        delta = ALPHA / RANK * adapter[f"{module}.lora_B.weight"] @ adapter[f"{module}.lora_A.weight"]
        torch.testing.assert_close(base[name] + delta, merged[name], rtol=0, atol=1e-6)


def test_folders_are_converted_into_each_other(run, tiny_model: Path, tmp_path: Path) -> None:
    assert run("export", tiny_model, tmp_path / "native", "--layout", "mistral").code == 0
    assert run("export", tmp_path / "native", tmp_path / "hf").code == 0
    theirs, ours = load_file(tiny_model / "model.safetensors"), tensors(tmp_path / "hf")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    run("export", tiny_model, tmp_path / "half", "--precision", "float16")
    assert tensors(tmp_path / "half")["language_model.lm_head.weight"].dtype is torch.float16


def test_what_cannot_be_exported_is_refused(run, lora_run: Path, tiny_model: Path, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        result = run("export", *arguments)
        assert result.code == 2
        return result.err

    assert "need a checkpoint of a run" in refused(tiny_model, tmp_path / "out", "--ema")
    assert "has no adapters" in refused(tiny_model, tmp_path / "out", "--layout", "peft")
    for source in (tiny_model, lora_run):
        assert "is the model that would be read" in refused(source, tiny_model)
        assert "lies in the model that would be read" in refused(source, tiny_model / "native", "--layout", "mistral")
    assert "cannot be loaded as a Voxtral" in refused(tmp_path, tmp_path / "out")
    empty = tmp_path / "run"
    empty.mkdir()
    (empty / "config.yaml").write_text(yaml.safe_dump({}))
    assert "no intact checkpoint" in refused(empty, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_converted_is_refused_and_leaves_nothing(run, tiny_model: Path, tmp_path: Path) -> None:
    def refused(layout: str) -> str:
        message: str = run("export", tmp_path / "model", tmp_path / "out", "--layout", layout).refusal()
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        return message

    shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 8}}))
    assert "its weights are quantized" in refused("mistral")
    (tmp_path / "model" / "config.json").write_text("[]")
    assert "cannot be loaded as a Voxtral" in refused("hf")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "preprocessor_config.json").unlink(missing_ok=True)
    (tmp_path / "model" / "tekken.json").write_text("{}")
    for layout in ("hf", "mistral"):
        assert "tekken.json must describe the model's audio in a section `audio`" in refused(layout)


def test_params_that_are_not_of_a_plain_voxtral_are_refused(run, tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text("[]")
    assert "cannot be loaded as a Voxtral" in run("export", tmp_path, tmp_path.with_name("out")).refusal()
    (tmp_path / "params.json").write_text(json.dumps({"quantization": {"qformat_weight": "fp8_e4m3"}}))
    assert "its weights are quantized" in run("export", tmp_path, tmp_path.with_name("out")).refusal()


@pytest.mark.parametrize(
    ("lora", "sentence"),
    [
        (LoraConfig(), None),
        (LoraConfig(use_dora=True), "DoRA"),
        (LoraConfig(trained_whole=("projector",)), "projector"),
        (LoraConfig(targets={"encoder": ("fc1",)}), "encoder"),
    ],
)
def test_vllm_serves_plain_adapters_of_the_language_model(lora: LoraConfig, sentence: str | None) -> None:
    refusal = vllm_refusal(lora)
    assert refusal is None if sentence is None else refusal is not None and sentence in refusal


@pytest.mark.parametrize("layout", ["hf", "vllm-lora"])
def test_an_export_that_would_answer_like_its_base_is_an_error(
    layout: str, run, lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def untrained(*arguments: Any) -> Iterator[tuple[str, Tensor]]:
        weights = checkpoint_weights(*arguments)
        return ((name, torch.zeros_like(value) if ".lora_B." in name else value) for name, value in weights)

    monkeypatch.setattr("voxtral_dist.export.checkpoint_weights", untrained)
    assert "change nothing" in run("export", lora_run, tmp_path / "out", "--layout", layout).refusal()
    assert list(tmp_path.iterdir()) == []


def test_adapters_that_change_nothing_are_an_error() -> None:
    layer = "model.language_model.layers.0.self_attn.q_proj"
    names = [f"{layer}.lora_{matrix}.default.weight" for matrix in "AB"]
    assert {vllm_adapter_module(vllm_name(name)) for name in names} <= VLLM_MODULES
    trained = dict(zip(names, (torch.ones(3, 8), torch.zeros(8, 3)), strict=True))
    with pytest.raises(UserError, match="change nothing"):
        refuse_without_effect(trained)
    refuse_without_effect(trained | {names[1]: torch.full((8, 3), 1e-6)})
