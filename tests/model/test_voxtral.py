"""A filled meta model is the model that its weights came from, in their precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import VoxtralConfig

from voxtral_dist.config import ModelConfig, TrainableConfig
from voxtral_dist.model.blocks import blocks_of
from voxtral_dist.model.voxtral import TargetLogits, fill_meta_model, meta_model, trained_meta_model
from voxtral_dist.model.weights import load_for_inference, load_voxtral


def test_a_filled_meta_model_is_its_source_and_keeps_buffers_in_float32(tiny_model: Path) -> None:
    source = load_voxtral(ModelConfig(path=str(tiny_model), precision="bfloat16"))
    copy = meta_model(VoxtralConfig.from_pretrained(tiny_model))
    fill_meta_model(
        copy, ((name, parameter.detach()) for name, parameter in source.named_parameters()), source.named_buffers()
    )
    for ours, theirs in (
        (copy.named_parameters(), source.named_parameters()),
        (copy.named_buffers(), source.named_buffers()),
    ):
        for (name, value), (expected_name, expected) in zip(ours, theirs, strict=True):
            assert (name, value.dtype) == (expected_name, expected.dtype)
            assert torch.equal(value, expected)
    assert {buffer.dtype for name, buffer in copy.named_buffers() if name.endswith("inv_freq")} == {torch.float32}
    assert torch.bfloat16 in {parameter.dtype for parameter in copy.parameters()}


def test_a_trained_model_generates_as_the_published_class_does(tiny_model: Path) -> None:
    trained = load_voxtral(ModelConfig(path=str(tiny_model), precision="float32")).eval()
    published = load_for_inference(str(tiny_model), torch.device("cpu"), "float32")
    audio = trained.config.audio_config
    num_tokens = audio.max_source_positions * audio.hidden_size // audio.intermediate_size
    inputs = {
        "input_ids": torch.tensor([[7, *[trained.config.audio_token_id] * num_tokens, 9]]),
        "input_features": torch.randn(1, audio.num_mel_bins, 2 * audio.max_source_positions),
    }
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 11}
    assert torch.equal(trained.generate(**inputs, **options), published.generate(**inputs, **options))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk_tokens", [5, 64])
def test_the_loss_in_chunks_is_torchs_with_its_gradients(chunk_tokens: int, label_smoothing: float) -> None:
    torch.manual_seed(0)
    layer = TargetLogits(16, 300, bias=False).double()
    hidden = torch.randn(37, 16, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(300, (37,))
    loss = layer(hidden, labels, chunk_tokens, label_smoothing)
    logits = F.linear(hidden, layer.weight).float()
    expected = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = torch.autograd.grad(loss, [hidden, layer.weight])
    for gradient, theirs in zip(gradients, torch.autograd.grad(expected, [hidden, layer.weight]), strict=True):
        torch.testing.assert_close(gradient, theirs, rtol=1e-6, atol=1e-7)


def test_blocks_are_compiled_in_training_alone(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda forward, fullgraph: lambda *_, **__: "compiled")
    config = ModelConfig(path=str(tiny_model), precision="float32", compile_blocks=True)
    model = trained_meta_model(config, TrainableConfig(), torch.float32)
    block = blocks_of(model)["encoder"][0]
    hidden = torch.empty(1, 4, model.config.audio_config.d_model, device="meta")
    assert block(hidden, None) == "compiled"
    model.eval()
    assert torch.is_tensor(block(hidden, None)[0])
