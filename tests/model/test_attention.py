"""Attention without masks: padding behind the tokens changes nothing, and cuDNN stays out of the language model."""

from pathlib import Path

import numpy as np
import pytest
import torch

from voxtral_dist.config import ActivationCheckpointingConfig, ModelConfig
from voxtral_dist.data.examples.example import Example
from voxtral_dist.data.examples.micro_batch import collate
from voxtral_dist.engine.loss import LossOfMicroBatch
from voxtral_dist.model.attention import masked_attention
from voxtral_dist.model.blocks import blocks_of
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.model.voxtral import TrainedVoxtral
from voxtral_dist.model.weights import load_voxtral


def spoken(prompts: VoxtralPrompts, text: str, num_windows: int) -> Example:
    pcm = np.random.default_rng(len(text)).normal(0, 3000, num_windows * prompts.window_samples).astype(np.int16)
    prompt = prompts.transcription("en", num_windows)
    return Example(0, "key", pcm, num_windows, prompt, tuple(prompts.completion(text)), text, float(num_windows))


def loss_and_gradients(
    model: TrainedVoxtral, folder: Path, prompts: VoxtralPrompts, examples: list[list[Example]]
) -> tuple[float, dict[str, torch.Tensor]]:
    """The sum over micro-batches, each of some examples padded together."""
    loss_of = LossOfMicroBatch(LogMel.from_pretrained(str(folder), torch.device("cpu")), 2048)
    model.zero_grad()
    loss = sum(loss_of(model, collate(each, prompts)) for each in examples)
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_examples_padded_together_are_examples_alone(tiny_model: Path, prompts: VoxtralPrompts, attention: str) -> None:
    model = load_voxtral(ModelConfig(path=str(tiny_model), precision="float32", attention=attention))
    examples = [spoken(prompts, "yes", 1), spoken(prompts, "a much longer text than that", 3), spoken(prompts, "no", 2)]
    together = loss_and_gradients(model, tiny_model, prompts, [examples])
    alone = loss_and_gradients(model, tiny_model, prompts, [[one] for one in examples])
    assert together[0] == pytest.approx(alone[0], rel=1e-6)
    assert together[1].keys() == alone[1].keys()
    for name, gradient in alone[1].items():
        torch.testing.assert_close(together[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_both_kernels_are_causal(tiny_model: Path, prompts: VoxtralPrompts) -> None:
    losses = {}
    for attention in ("sdpa", "eager"):
        model = load_voxtral(ModelConfig(path=str(tiny_model), precision="float32", attention=attention))
        losses[attention], _ = loss_and_gradients(model, tiny_model, prompts, [[spoken(prompts, "a text", 1)]])
    assert losses["sdpa"] == pytest.approx(losses["eager"], rel=1e-6)


@pytest.mark.parametrize("allowed", [False, True])
def test_cudnn_is_off_in_blocks_of_the_language_model_and_what_a_checkpoint_recomputes(
    tiny_model: Path, prompts: VoxtralPrompts, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    config = ModelConfig(
        path=str(tiny_model),
        precision="float32",
        cudnn_attention=allowed,
        activation_checkpointing=ActivationCheckpointingConfig(encoder=1, language_model=1),
    )
    model = load_voxtral(config)
    seen: list[tuple[str, bool]] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def recorded(query: torch.Tensor, *arguments: object, **named: object) -> torch.Tensor:
        part = "language_model" if named.get("is_causal") else "encoder"
        seen.append((part, torch.backends.cuda.cudnn_sdp_enabled()))
        return original(query, *arguments, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    loss_and_gradients(model, tiny_model, prompts, [[spoken(prompts, "a text", 1)]])
    blocks = blocks_of(model)
    # Once in the forward pass, and once more in the backward pass of its checkpoint.
    assert seen.count(("language_model", allowed)) == 2 * len(blocks["language_model"])
    assert seen.count(("encoder", True)) == 2 * len(blocks["encoder"])
    assert len(seen) == 2 * (len(blocks["language_model"]) + len(blocks["encoder"]))
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_decoding_takes_masks_by_kernels_that_are_made_for_them(tiny_model: Path) -> None:
    model = load_voxtral(ModelConfig(path=str(tiny_model), precision="float32"))
    text_config = model.model.language_model.config
    text_config._attn_implementation = "flash_attention_2"
    with masked_attention(model):
        assert text_config._attn_implementation == "sdpa"
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert text_config._attn_implementation == "flash_attention_2"
    assert torch.backends.cuda.cudnn_sdp_enabled()
