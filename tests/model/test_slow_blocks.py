"""Compiled blocks compute what plain ones do: compilation takes a minute of a core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from voxtral_dist.config import ActivationCheckpointingConfig, LoraConfig, ModelConfig, TrainableConfig
from voxtral_dist.model.weights import load_voxtral

pytestmark = pytest.mark.slow


LONG_AUDIO = {"mlp_chunk_tokens": 7, "activation_offloading": True}


def losses_and_gradients(
    tiny_model: Path, compile_blocks: bool, settings: dict[str, Any]
) -> list[tuple[Tensor, Tensor]]:
    """Losses of inputs of several lengths, so that the compiler treats shapes as symbols."""
    checkpointing = ActivationCheckpointingConfig(encoder=2, language_model=1)
    model = load_voxtral(
        ModelConfig(
            path=str(tiny_model),
            precision="float32",
            compile_blocks=compile_blocks,
            activation_checkpointing=checkpointing,
            **settings,
        ),
        TrainableConfig(lora=LoraConfig(rank=2, trained_whole=["encoder"])),
    )
    num_positions = model.config.audio_config.max_source_positions
    features = torch.randn((1, 128, 2 * num_positions), generator=torch.Generator().manual_seed(0))
    prompt = [1, 3, 25, *[model.config.audio_token_id] * (num_positions // 4), 4, 34]
    results = []
    for words in (1, 4, 6):
        model.zero_grad()
        loss = model(
            input_ids=torch.tensor([prompt + [300] * words]),
            input_features=features,
            audio_places=torch.arange(3, 3 + num_positions // 4),
            target_ids=torch.full((words,), 301),
            target_places=torch.arange(len(prompt), len(prompt) + words),
            chunk_tokens=2,
        )
        loss.backward()
        gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        results.append((loss.detach(), torch.cat(gradients)))
    return results


@pytest.mark.parametrize("settings", [{}, LONG_AUDIO], ids=["whole", "in chunks and offloaded"])
def test_compiled_blocks_give_the_same_losses_and_gradients(tiny_model: Path, settings: dict[str, Any]) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = losses_and_gradients(tiny_model, compile_blocks=True, settings=settings)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2, "nothing was compiled"
    assert not torch._dynamo.utils.counters["graph_break"]
    for (loss, gradient), (expected, plain) in zip(compiled, losses_and_gradients(tiny_model, False, {}), strict=True):
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-5)
