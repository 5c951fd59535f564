"""43 minutes of audio in one forward and backward pass, as long as the published models allow, in bounded memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from voxtral_dist.config import ActivationCheckpointingConfig, ModelConfig
from voxtral_dist.model.encoder import ChunkedEncoder
from voxtral_dist.model.tiny import NUM_MEL_BINS, build_tiny_voxtral
from voxtral_dist.model.weights import load_voxtral

from corpora import REAL_WINDOW_SHAPE
from workloads.peak_memory import added_peak, in_fresh_process

NUM_POSITIONS = 32_768
# The intermediate values of an MLP are what a block needs most memory for, as in the published models.
SHAPE = replace(REAL_WINDOW_SHAPE, text_layers=2, text_ffn_width=1024, max_text_positions=NUM_POSITIONS)
CHUNK_TOKENS = 1024
FLOAT32_BYTES = 4


def measure(folder: Path, num_windows: int) -> dict[str, Any]:
    """Bytes that a pass over one example of so many windows adds to its process, and its loss."""
    model = load_voxtral(
        ModelConfig(
            path=str(folder),
            precision="float32",
            activation_checkpointing=ActivationCheckpointingConfig(language_model=1),
            activation_offloading=True,
            mlp_chunk_tokens=CHUNK_TOKENS,
            encoder_windows_per_chunk=2,
        )
    )
    ChunkedEncoder(model, 2)

    def step(windows: int) -> float:
        num_audio = windows * SHAPE.num_audio_tokens
        num_text = NUM_POSITIONS - num_audio if windows == num_windows else 10
        ids = torch.tensor([[model.config.audio_token_id] * num_audio + [300] * num_text])
        loss = model(
            input_ids=ids,
            input_features=torch.zeros(windows, NUM_MEL_BINS, 2 * SHAPE.num_positions),
            audio_places=torch.arange(num_audio),
            target_ids=torch.full((num_text,), 301),
            target_places=torch.arange(num_audio, num_audio + num_text),
            chunk_tokens=64,
        )
        loss.backward()
        return float(loss.detach()) / num_text

    return added_peak(lambda: step(num_windows), warm_up=lambda: step(2))


@pytest.mark.slow
def test_a_pass_over_32768_positions_needs_less_memory_than_the_mlps_whose_values_it_would_keep(tmp_path: Path) -> None:
    build_tiny_voxtral(tmp_path / "model", SHAPE)
    num_windows = NUM_POSITIONS // SHAPE.num_audio_tokens
    assert num_windows * SHAPE.window_seconds == 87 * 30
    measured = in_fresh_process(measure, tmp_path / "model", num_windows)
    # Gate, its activation and the other factor, of one block: 403 MB. 198 MB were measured, of which 134 MB are
    # features, and 981 MB without chunks.
    of_one_mlp = 3 * NUM_POSITIONS * SHAPE.text_ffn_width * FLOAT32_BYTES
    assert measured["added_peak_bytes"] < of_one_mlp
    assert 0 < measured["value"] < 20
