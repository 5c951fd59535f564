"""Exports of a run with adapters compute what was trained, both merged and as loaded by peft."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import VoxtralForConditionalGeneration

from voxtral_dist.config import LoraConfig, RunConfig, TrainableConfig
from voxtral_dist.distributed.world import alone
from voxtral_dist.export import export_trained, serving_notes
from voxtral_dist.model.native import POSITIONS
from voxtral_dist.model.voxtral import TrainedVoxtral, read_voxtral_config
from voxtral_dist.model.weights import load_voxtral

from runs import run_config


class OneProcess:
    """The part of an engine that exports need."""

    def __init__(self, model: TrainedVoxtral) -> None:
        self._model = model

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, parameter.detach()) for name, parameter in self._model.named_parameters())


def export(model: TrainedVoxtral, config: RunConfig) -> None:
    engine: Any = OneProcess(model)
    export_trained(engine, config, alone("cpu"), step=5)


def inputs_of(model: VoxtralForConditionalGeneration) -> dict[str, Tensor]:
    num_positions = model.config.audio_config.max_source_positions
    audio = [model.config.audio_token_id] * (num_positions // 4)
    features = torch.randn((1, 128, 2 * num_positions), generator=torch.Generator().manual_seed(1))
    return {"input_ids": torch.tensor([[1, 3, 25, *audio, 4, 34, 300, 301]]), "input_features": features}


@torch.no_grad()
def logits_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model.eval()(**inputs).logits
    return logits


@pytest.fixture(params=["lora", "dora"])
def trained(request: pytest.FixtureRequest, tiny_model: Path, shard_folder: Path, tmp_path: Path) -> Any:
    """A run's configuration, and a model whose trained parameters differ from their initial values."""
    lora = LoraConfig(
        rank=3,
        alpha=5,
        use_dora=request.param == "dora",
        targets={"encoder": ["q_proj", "k_proj", "fc2"], "language_model": ["v_proj", "down_proj"]},
        trained_whole=["projector"],
    )
    config = run_config(
        tmp_path / "run", tiny_model, shard_folder, num_steps=5, trainable=TrainableConfig(lora=lora).model_dump()
    )
    model = load_voxtral(config.model, config.trainable)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return config, model


def test_adapters_are_merged_into_a_plain_model_and_stored_for_peft(trained: tuple[RunConfig, TrainedVoxtral]) -> None:
    config, model = trained
    export(model, config)
    expected = logits_of(model, inputs_of(model))
    base = VoxtralForConditionalGeneration.from_pretrained(config.model.path)
    assert not torch.allclose(logits_of(base, inputs_of(model)), expected, atol=0.1)
    merged = VoxtralForConditionalGeneration.from_pretrained(config.run_dir / "export")
    torch.testing.assert_close(logits_of(merged, inputs_of(model)), expected, rtol=1e-5, atol=1e-5)
    by_peft = peft.PeftModel.from_pretrained(base, config.run_dir / "adapter")
    torch.testing.assert_close(logits_of(by_peft, inputs_of(model)), expected, rtol=1e-5, atol=1e-5)
    small = (config.run_dir / "adapter" / "adapter_model.safetensors").stat()
    assert small.st_size < 0.5 * (config.run_dir / "export" / "model.safetensors").stat().st_size
    assert stat.S_IMODE(small.st_mode) & stat.S_IRGRP, "a server may run as another user"


def test_without_adapters_there_is_no_adapter_folder(tiny_model: Path, shard_folder: Path, tmp_path: Path) -> None:
    config = run_config(tmp_path / "run", tiny_model, shard_folder, num_steps=5)
    model = load_voxtral(config.model)
    half = config.model.model_copy(update={"precision": "bfloat16"})
    export(model, config.model_copy(update={"model": half}))
    exported = VoxtralForConditionalGeneration.from_pretrained(config.run_dir / "export", dtype="auto")
    for name, value in exported.state_dict().items():
        trained = model.state_dict()[name]
        expected = trained if name == POSITIONS else trained.bfloat16().float()
        assert torch.equal(value.float(), expected), name
    assert not (config.run_dir / "adapter").exists()


def test_what_exports_cannot_do_is_said_at_the_start(tiny_model: Path, shard_folder: Path, tmp_path: Path) -> None:
    def notes(lora: LoraConfig | None = None, **model: object) -> list[str]:
        config = run_config(tmp_path / "run", tiny_model, shard_folder, num_steps=5)
        trainable = TrainableConfig(lora=lora)
        changed = {"model": config.model.model_copy(update=model), "trainable": trainable}
        return serving_notes(config.model_copy(update=changed))

    limit = read_voxtral_config(str(tiny_model)).text_config.max_position_embeddings
    assert notes() == notes(LoraConfig()) == notes(max_positions=limit) == []
    for lora in (LoraConfig(use_dora=True), LoraConfig(trained_whole=("projector",))):
        (note,) = notes(lora)
        assert note.endswith("its adapters alone cannot be served there, the merged model in `export-mistral/` can.")
    (note,) = notes(max_positions=limit + 1)
    assert f"but the model was trained for {limit} positions" in note
