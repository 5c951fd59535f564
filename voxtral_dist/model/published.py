"""Configurations and prompts of the published models without their files, for estimates, tests and benchmarks.

Training and decoding read the checkpoint itself. In estimates, too, what lies in a folder or in the hub's cache goes
before this table.
"""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import VoxtralConfig

from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.model.tekken import MAX_VOCAB_SIZE, tekken_json
from voxtral_dist.model.voxtral import read_voxtral_config, window_seconds

# As in their config.json. Both have the encoder of Whisper large-v3.
_ENCODER = {
    "model_type": "voxtral_encoder",
    "num_mel_bins": 128,
    "max_source_positions": 1500,
    "hidden_size": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "intermediate_size": 5120,
}
_MINI_LANGUAGE_MODEL = {
    "model_type": "llama",
    "vocab_size": MAX_VOCAB_SIZE,
    "hidden_size": 3072,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 8192,
    "max_position_embeddings": 32_768,  # of params.json; the value of config.json is not the model's
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e8},
}
_SMALL_LANGUAGE_MODEL = _MINI_LANGUAGE_MODEL | {
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "intermediate_size": 32_768,
}

MINI = "mistralai/Voxtral-Mini-3B-2507"
SMALL = "mistralai/Voxtral-Small-24B-2507"
_LANGUAGE_MODELS = {MINI: _MINI_LANGUAGE_MODEL, SMALL: _SMALL_LANGUAGE_MODEL}
PUBLISHED_MODELS = tuple(_LANGUAGE_MODELS)
_NUM_SPECIAL_TOKENS = 1000


def published_settings(name: str) -> dict[str, Any]:
    """The keyword arguments of `VoxtralConfig` for a model of `PUBLISHED_MODELS`, in plain types."""
    return {
        "audio_config": deepcopy(_ENCODER),
        "text_config": deepcopy(_LANGUAGE_MODELS[name]),
        "audio_token_id": 24,
        "projector_hidden_act": "gelu",
        "dtype": "bfloat16",
    }


def published_config(name: str) -> VoxtralConfig:
    """The configuration of a model of `PUBLISHED_MODELS`."""
    return VoxtralConfig(**published_settings(name))


@cache
def published_prompts(name: str, max_positions: int | None = None) -> VoxtralPrompts:
    """The prompts of a model of `PUBLISHED_MODELS`, by the vocabulary that mistral-common brings."""
    config = published_config(name)
    tekken = tekken_json(MAX_VOCAB_SIZE, window_seconds(config), _NUM_SPECIAL_TOKENS)
    # mistral-common and transformers read files only.
    with TemporaryDirectory() as folder:
        Path(folder, "tekken.json").write_text(json.dumps(tekken), encoding="utf-8")
        config.save_pretrained(folder)
        return VoxtralPrompts.from_pretrained(folder, max_positions)


def voxtral_config_for_estimates(path: str) -> VoxtralConfig:
    """The configuration of a folder or of the hub's cache, else of the table above, else of the hub.

    Raises:
        UserError: the path is not a Voxtral checkpoint.
    """
    folder = stored_folder(path, "config.json")
    if folder is None and path in PUBLISHED_MODELS:
        return published_config(path)
    return read_voxtral_config(folder or path)


def prompts_for_estimates(path: str, max_positions: int | None = None) -> VoxtralPrompts:
    """The prompts of a model whose configuration is found by `voxtral_config_for_estimates`, in the same order.

    Args:
        path: folder or hub name.
        max_positions: as for `VoxtralPrompts.from_pretrained`.

    Raises:
        UserError: `tekken.json` is missing, or is not that of a Voxtral.
    """
    folder = stored_folder(path, "tekken.json")
    if folder is None and path in PUBLISHED_MODELS:
        return published_prompts(path, max_positions)
    return VoxtralPrompts.from_pretrained(folder or path, max_positions)


def stored_folder(path: str, file_name: str) -> str | None:
    """The folder on this machine that holds a file of a model: the path itself, or one of the hub's cache.

    None if the path is no folder and the file is not in the cache. The network is not used.
    """
    if Path(path).is_dir():
        return path
    try:
        cached = try_to_load_from_cache(path, file_name)
    except HFValidationError:
        return None
    return str(Path(cached).parent) if isinstance(cached, str) else None
