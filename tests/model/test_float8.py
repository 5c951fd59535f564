"""Float8: which layers compute in it, the formula of its products, and what stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from voxtral_dist.config import ModelConfig, RunConfig, TrainableConfig
from voxtral_dist.engine.build import check_engine
from voxtral_dist.errors import UserError
from voxtral_dist.model import float8
from voxtral_dist.model.blocks import blocks_of
from voxtral_dist.model.voxtral import TrainedVoxtral, trained_meta_model
from voxtral_dist.model.weights import load_voxtral

from runs import ROOT

pytest.importorskip("torchao")
MATRICES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
ENCODER_ADAPTERS = {"lora": {"rank": 2, "targets": {"encoder": ["fc1"]}, "trained_whole": ["language_model"]}}
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def emulated(path: Path | str, **settings: Any) -> ModelConfig:
    tree = {"path": str(path), "precision": "float32", "float8": "rowwise_emulated", **settings}
    return ModelConfig.model_validate(tree)


def converted(model: nn.Module) -> set[str]:
    return {name for name, one in model.named_modules() if type(one).__name__ == "Float8InTraining"}


@pytest.mark.parametrize("trainable", [{}, {"frozen": ["encoder"]}, ENCODER_ADAPTERS], ids=["all", "frozen", "LoRA"])
def test_matrices_of_the_language_models_blocks_are_converted(tiny_model: Path, trainable: dict[str, Any]) -> None:
    chosen = TrainableConfig.model_validate(trainable)
    model = trained_meta_model(emulated(tiny_model), chosen, torch.float32)
    blocks = blocks_of(model)["language_model"]
    found = converted(model)
    assert {name.rpartition(".")[2] for name in found} == MATRICES
    assert len(found) == len(MATRICES) * len(blocks)
    assert all(name.startswith("model.language_model.layers.") for name in found)
    plain = trained_meta_model(emulated(tiny_model, float8=None), chosen, torch.float32)
    assert not converted(plain)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]


def test_a_frozen_matrix_and_one_of_other_dimensions_stay(tiny_model: Path) -> None:
    frozen = TrainableConfig.model_validate({"frozen": ["*.layers.0.mlp.*"]})
    found = converted(trained_meta_model(emulated(tiny_model), frozen, torch.float32))
    assert "model.language_model.layers.0.self_attn.q_proj" in found
    assert not any(".layers.0.mlp." in name for name in found)
    block = nn.ModuleDict({"kept": nn.Linear(24, 32), "wide": nn.Linear(32, 24), "converted": nn.Linear(32, 48)})
    float8.train_in_float8([block], emulated(tiny_model))
    assert converted(block) == {"converted"}


def rounded(values: Tensor, dimension: int) -> Tensor:
    """The values in e4m3 with a scale, a power of two, for what is summed over along a dimension."""
    scale = torch.exp2(torch.floor(torch.log2(448 / values.abs().amax(dimension, keepdim=True).clamp(min=1e-12))))
    return (values * scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() / scale


# Sums over positions, whose number is no multiple of 16.
@pytest.mark.parametrize("shape", [(3, 37), (16,), (1, 1)])
def test_products_are_those_of_factors_rounded_by_rows(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    block = nn.ModuleDict({"layer": nn.Linear(64, 96, bias=False)})
    weight = block["layer"].weight.detach().clone()
    float8.train_in_float8([block], emulated("anywhere"))
    inputs = torch.randn(*shape, 64, generator=generator).mul(2).exp().requires_grad_()
    gradient = torch.randn(*shape, 96, generator=generator)
    output = block["layer"](inputs)
    output.backward(gradient)
    rows, gradients = inputs.detach().flatten(0, -2), gradient.flatten(0, -2)
    close = {"rtol": 1e-5, "atol": 1e-5}
    expected = rounded(rows, 1) @ rounded(weight, 1).T
    torch.testing.assert_close(output.flatten(0, -2), expected, **close)
    assert (expected - rows @ weight.T).norm() > 1e-3 * expected.norm(), "rounding changes something"
    expected = rounded(gradients, 1) @ rounded(weight, 0)
    torch.testing.assert_close(inputs.grad.flatten(0, -2), expected, **close)
    expected = rounded(gradients, 0).T @ rounded(rows, 0)
    torch.testing.assert_close(block["layer"].weight.grad, expected, **close)


def loss_and_gradients(model: TrainedVoxtral, words: int = 1) -> tuple[Tensor, list[Tensor]]:
    """Of two examples of one window and so many words."""
    num_positions = model.config.audio_config.max_source_positions
    num_audio = num_positions // 4
    row = [1, 3, 25, *[model.config.audio_token_id] * num_audio, 4, 34, *[300] * words]
    starts = torch.arange(2)[:, None] * len(row)
    features = torch.randn(2, 128, 2 * num_positions, generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    loss = model(
        input_ids=torch.tensor([row] * 2),
        input_features=features,
        audio_places=(starts + torch.arange(3, 3 + num_audio)).flatten(),
        target_ids=torch.tensor([300, 301] * 2),
        target_places=(starts + torch.tensor([len(row) - 2, len(row) - 1])).flatten(),
        chunk_tokens=8,
    )
    if torch.is_grad_enabled():
        loss.backward()
    return loss.detach(), [one.grad.clone() for one in model.parameters() if one.grad is not None]


def test_checkpoints_compute_the_same_again_and_evaluations_round_nothing(tiny_model: Path) -> None:
    kept, plain = load_voxtral(emulated(tiny_model)), load_voxtral(emulated(tiny_model, float8=None))
    checkpointed = load_voxtral(emulated(tiny_model, activation_checkpointing={"language_model": 1}))
    loss, gradients = loss_and_gradients(kept)
    again, recomputed = loss_and_gradients(checkpointed)
    assert torch.equal(loss, again)
    assert all(torch.equal(one, other) for one, other in zip(gradients, recomputed, strict=True))
    assert 1e-5 < abs(loss - loss_and_gradients(plain)[0]) / loss < 0.02
    kept.eval()
    plain.eval()
    with torch.no_grad():
        assert torch.equal(loss_and_gradients(kept)[0], loss_and_gradients(plain)[0])


@pytest.mark.parametrize(
    "trainable",
    [
        {"lora": {"rank": 2}},
        {"lora": {"rank": 2, "quantized": ["language_model"]}},
        {"frozen": ["language_model"]},
    ],
    ids=["LoRA", "QLoRA", "frozen"],
)
def test_a_frozen_language_model_is_refused(tiny_model: Path, trainable: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="found no trained matrix"):
        trained_meta_model(emulated(tiny_model), TrainableConfig.model_validate(trainable), torch.float32)


def run_with(engine: dict[str, Any], **model: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run_dir": "runs/none",
            "num_steps": 200,
            "model": {"path": "mistralai/Voxtral-Mini-3B-2507", "compile_blocks": False, **model},
            "train_data": {"shards": ["shards"], "slots_per_step": 1, "max_examples": 1},
            "optimizer": {"learning_rate": 1e-5},
            "engine": engine,
        }
    )


def test_devices_without_float8_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (8, 6)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA RTX A6000")
    config, fsdp2 = {"float8": "rowwise"}, {"fsdp2": {}}
    with pytest.raises(UserError, match="but this is a CPU: remove it, or choose rowwise_emulated"):
        check_engine(run_with(fsdp2, **config), 1, CPU)
    with pytest.raises(UserError, match="but NVIDIA RTX A6000 is older"):
        check_engine(run_with(fsdp2, **config), 1, CUDA)
    capability = (8, 9)
    check_engine(run_with(fsdp2, **config), 1, CUDA)
    check_engine(run_with(fsdp2, float8="rowwise_emulated"), 1, CPU)


def test_zero_3_is_refused() -> None:
    for stage in (1, 2):
        check_engine(run_with({"deepspeed": ROOT / f"ds_configs/zero{stage}.json"}, float8="rowwise_emulated"))
    with pytest.raises(UserError, match=r"does not work with ZeRO-3.*choose FSDP2, or a stage below 3"):
        check_engine(run_with({"deepspeed": ROOT / "ds_configs/zero3.json"}, float8="rowwise_emulated"))


def test_a_missing_package_is_named(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'voxtral-dist\[float8\]'"):
        check_engine(run_with({"fsdp2": {}}, float8="rowwise_emulated"), 1, CPU)
    with pytest.raises(UserError, match=r"pip install 'voxtral-dist\[float8\]'"):
        trained_meta_model(emulated(tiny_model), TrainableConfig(), torch.float32)


@pytest.mark.parametrize(("recipe", "precision"), [("rowwise", "float32"), ("rowwise_emulated", "float16")])
def test_other_precisions_are_refused(recipe: str, precision: str) -> None:
    with pytest.raises(ValidationError, match=r"needs `model.precision: bfloat16`, but it is float"):
        emulated("anywhere", float8=recipe, precision=precision)
