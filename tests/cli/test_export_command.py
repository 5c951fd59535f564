"""`voxtral-dist export` writes from a run what the run wrote itself, and adapters have names that vLLM knows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from voxtral_dist.checkpoints.complete import read_complete
from voxtral_dist.checkpoints.files import read_states
from voxtral_dist.config import LoraConfig
from voxtral_dist.errors import UserError
from voxtral_dist.exports.adapter_folders import refuse_without_effect, vllm_name, vllm_refusal

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
    sections = {"engine": {"fsdp2": {}}, "trainable": {"lora": lora}, "optimizer": optimizer}
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
    for path in own.glob("*.json"):
        assert (written / path.name).read_bytes() == path.read_bytes()


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
    assert "is the model that would be read" in refused(tiny_model, tiny_model)
    assert "cannot be loaded as a Voxtral" in refused(tmp_path, tmp_path / "out")
    empty = tmp_path / "run"
    empty.mkdir()
    (empty / "config.yaml").write_text(yaml.safe_dump({}))
    assert "no intact checkpoint" in refused(empty, tmp_path / "out")
    assert not (tmp_path / "out").exists()


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


def test_adapters_that_change_nothing_are_an_error() -> None:
    layer = "model.language_model.layers.0.self_attn.q_proj"
    names = [f"{layer}.lora_{matrix}.default.weight" for matrix in "AB"]
    assert {vllm_adapter_module(vllm_name(name)) for name in names} <= VLLM_MODULES
    trained = dict(zip(names, (torch.ones(3, 8), torch.zeros(8, 3)), strict=True))
    with pytest.raises(UserError, match="change nothing"):
        refuse_without_effect(trained)
    refuse_without_effect(trained | {names[1]: torch.full((8, 3), 1e-6)})
