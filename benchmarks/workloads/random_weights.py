"""A folder with the published shape of Voxtral-Mini-3B-2507 and random weights: real sizes without a download."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import VoxtralConfig

from voxtral_dist.model.tiny import MAX_VOCAB_SIZE
from voxtral_dist.model.voxtral import meta_model

from workloads.speech import write_model

# What transformers itself begins with.
STANDARD_DEVIATION = 0.02
BYTES_PER_FILE = 4 * 10**9
# As in the published config.json.
PUBLISHED_ENCODER = {
    "num_mel_bins": 128,
    "max_source_positions": 1500,
    "hidden_size": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "intermediate_size": 5120,
}
PUBLISHED_LANGUAGE_MODEL = {
    "vocab_size": MAX_VOCAB_SIZE,
    "hidden_size": 3072,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 8192,
    "max_position_embeddings": 131_072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000_000.0},
}


def write_published_shape(folder: Path) -> Path:
    """Tokenizer and processor of the whole vocabulary, and 9.4 GB of bfloat16 weights in files of some GB each."""
    write_model(folder, MAX_VOCAB_SIZE)
    (folder / "model.safetensors").unlink()
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    described["audio_config"] |= PUBLISHED_ENCODER
    described["text_config"] |= PUBLISHED_LANGUAGE_MODEL
    (folder / "config.json").write_text(json.dumps(described | {"dtype": "bfloat16"}), encoding="utf-8")
    _write_weights(folder, VoxtralConfig.from_pretrained(folder))
    return folder


def _write_weights(folder: Path, config: VoxtralConfig) -> None:
    places: dict[str, str] = {}
    for number, part in enumerate(_parts(meta_model(config))):
        name = f"model-{number:05d}.safetensors"
        save_file(part, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _parts(model: Any) -> Iterator[dict[str, Tensor]]:
    """Weights of one file after the other: vectors are ones, which keeps norms as they begin, all else is normal."""
    generator = torch.Generator().manual_seed(0)
    part: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        part[name] = _drawn(parameter.shape, generator)
        if sum(tensor.nbytes for tensor in part.values()) > BYTES_PER_FILE:
            yield part
            part = {}
    yield part


def _drawn(shape: torch.Size, generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, STANDARD_DEVIATION, generator=generator)
