"""The published shape of Voxtral-Mini-3B, without weights."""

import json
from pathlib import Path

MINI = {
    "model_type": "voxtral",
    "audio_config": {
        "model_type": "voxtral_encoder",
        "num_mel_bins": 128,
        "max_source_positions": 1500,
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "intermediate_size": 5120,
    },
    "text_config": {
        "model_type": "llama",
        "vocab_size": 131_072,
        "hidden_size": 3072,
        "num_hidden_layers": 30,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 8192,
        "max_position_embeddings": 131_072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e8},
    },
    "audio_token_id": 24,
    "projector_hidden_act": "gelu",
}


def write_mini(folder: Path) -> Path:
    """Write the description of the model into a folder, and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MINI), encoding="utf-8")
    return folder
