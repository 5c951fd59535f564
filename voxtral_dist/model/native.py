"""Mistral's native layout of a Voxtral checkpoint: names of tensors, order of their rows, and `params.json`.

vLLM and mistral-inference load it; transformers loads the Hugging Face layout. Both hold the same numbers: names
differ, the encoder's positions (Whisper's sinusoids) are not stored, and the rows of the language model's query and key
matrices are in another order. Rotary embeddings rotate pairs of a head's d values: (0, 1), (2, 3), ... in the native
layout, (0, d/2), (1, d/2 + 1), ... in that of Hugging Face.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import VoxtralConfig, WhisperFeatureExtractor
from transformers.utils import cached_file

NATIVE_PARAMS = "params.json"
NATIVE_WEIGHTS = "consolidated.safetensors"
NATIVE_INDEX = "consolidated.safetensors.index.json"
POSITIONS = "model.audio_tower.embed_positions.weight"

# transformers' converter writes its default where `params.json` has no `max_seq_len`, as in both published models. They
# were trained for less (`max_position_embeddings` there), and vLLM serves no more.
_CONVERTED_POSITIONS, _PUBLISHED_POSITIONS = 131_072, 32_768

_BLOCK = re.compile(r"(?<=\.layers\.)\d+(?=\.)")
_NOT_RAISED: dict[str, Any] = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}
# The native folder of each hub name that was looked up, None for those of transformers: a start asks several times.
_hub_layouts: dict[str, Path | None] = {}
_ENCODER = "mm_whisper_embeddings.whisper_encoder"
# Modules of transformers' class, and of the native layout; * is the number of a block.
_MODULES = {
    "lm_head": "output",
    "model.language_model.embed_tokens": "mm_whisper_embeddings.tok_embeddings",
    "model.language_model.norm": "norm",
    "model.language_model.layers.*.input_layernorm": "layers.*.attention_norm",
    "model.language_model.layers.*.self_attn.q_proj": "layers.*.attention.wq",
    "model.language_model.layers.*.self_attn.k_proj": "layers.*.attention.wk",
    "model.language_model.layers.*.self_attn.v_proj": "layers.*.attention.wv",
    "model.language_model.layers.*.self_attn.o_proj": "layers.*.attention.wo",
    "model.language_model.layers.*.post_attention_layernorm": "layers.*.ffn_norm",
    "model.language_model.layers.*.mlp.gate_proj": "layers.*.feed_forward.w1",
    "model.language_model.layers.*.mlp.down_proj": "layers.*.feed_forward.w2",
    "model.language_model.layers.*.mlp.up_proj": "layers.*.feed_forward.w3",
    "model.audio_tower.conv1": f"{_ENCODER}.conv_layers.0",
    "model.audio_tower.conv2": f"{_ENCODER}.conv_layers.1",
    "model.audio_tower.layer_norm": f"{_ENCODER}.transformer.norm",
    "model.audio_tower.layers.*.self_attn_layer_norm": f"{_ENCODER}.transformer.layers.*.attention_norm",
    "model.audio_tower.layers.*.self_attn.q_proj": f"{_ENCODER}.transformer.layers.*.attention.wq",
    "model.audio_tower.layers.*.self_attn.k_proj": f"{_ENCODER}.transformer.layers.*.attention.wk",
    "model.audio_tower.layers.*.self_attn.v_proj": f"{_ENCODER}.transformer.layers.*.attention.wv",
    "model.audio_tower.layers.*.self_attn.out_proj": f"{_ENCODER}.transformer.layers.*.attention.wo",
    "model.audio_tower.layers.*.final_layer_norm": f"{_ENCODER}.transformer.layers.*.ffn_norm",
    "model.audio_tower.layers.*.fc1": f"{_ENCODER}.transformer.layers.*.feed_forward.w1",
    "model.audio_tower.layers.*.fc2": f"{_ENCODER}.transformer.layers.*.feed_forward.w2",
    "model.multi_modal_projector.linear_1": "mm_whisper_embeddings.audio_language_projection.0",
    "model.multi_modal_projector.linear_2": "mm_whisper_embeddings.audio_language_projection.2",
}
# The order of the language model's settings in published files.
_TEXT_KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
}
_ENCODER_KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "max_source_positions": "max_source_positions",
}


def native_folder(path: str) -> Path | None:
    """The folder of a checkpoint that has the native layout alone, given as a folder or a hub name; None for others.

    A folder that holds both layouts, as Mistral's repositories do, is read as a Hugging Face folder.
    """
    params = Path(path) / NATIVE_PARAMS
    if Path(path).is_dir():
        return params.parent if params.is_file() and not (Path(path) / "config.json").is_file() else None
    if path not in _hub_layouts:
        if _hub_file(path, "config.json") is not None:
            _hub_layouts[path] = None
        elif (found := _hub_file(path, NATIVE_PARAMS)) is not None:
            _hub_layouts[path] = Path(found).parent
    # Neither file may be a passing failure of the network.
    return _hub_layouts.get(path)


def _hub_file(name: str, file: str) -> str | None:
    found: str | None = cached_file(name, file, **_NOT_RAISED)
    return found


def context_limit(path: str, config: VoxtralConfig) -> int:
    """Positions that a checkpoint's language model was trained for; `config.json` of published models says more.

    Args:
        path: folder or hub name of the checkpoint. Nothing is downloaded.
        config: its configuration.
    """
    stated = int(config.text_config.max_position_embeddings)
    if stated != _CONVERTED_POSITIONS:
        return stated
    params = Path(path) / NATIVE_PARAMS
    if not Path(path).is_dir():
        params = Path(cached_file(path, NATIVE_PARAMS, local_files_only=True, **_NOT_RAISED) or params)
    if not params.is_file():
        return _PUBLISHED_POSITIONS
    return _positions(json.loads(params.read_text(encoding="utf-8")))


def _positions(params: Mapping[str, Any]) -> int:
    return int(params.get("max_position_embeddings") or params["max_seq_len"])


class NativeLayout:
    """Names and values of a model's tensors in the native layout, by their names in transformers' class.

    Example:
        >>> from voxtral_dist.model.native import NativeLayout
        >>> from voxtral_dist.model.voxtral import read_voxtral_config
        >>> layout = NativeLayout(read_voxtral_config("models/tiny"))
        >>> layout.name("model.language_model.layers.0.mlp.up_proj.weight")
        'layers.0.feed_forward.w3.weight'
    """

    def __init__(self, config: VoxtralConfig) -> None:
        text = config.text_config
        self._num_heads = {"q_proj": int(text.num_attention_heads), "k_proj": int(text.num_key_value_heads)}

    @staticmethod
    def name(name: str) -> str | None:
        """The native name of a tensor; None for the encoder's positions, which the layout does not store."""
        if name == POSITIONS:
            return None
        module, _, leaf = name.rpartition(".")
        block = _BLOCK.search(module)
        return f"{_MODULES[_BLOCK.sub('*', module)].replace('*', block[0] if block else '')}.{leaf}"

    def to_native(self, name: str, value: Tensor) -> Tensor:
        """A tensor as the native layout stores it."""
        num_heads = self._rotated_heads(name)
        return value if num_heads is None else _reordered(value, (num_heads, 2, -1))

    def rows_from_native(
        self, name: str, num_rows: int, read: Callable[[int, int], Tensor], start: int, stop: int
    ) -> Tensor:
        """The rows `start` to `stop` of a stored tensor in the order of transformers' class.

        It is the inverse of `to_native`. Only the heads in which the rows lie are read.

        Args:
            name: the tensor, in transformers' class.
            num_rows: rows of the whole tensor.
            read: reads rows of the stored tensor, from and up to an index.
            start: first row.
            stop: the row after the last one.
        """
        num_heads = self._rotated_heads(name)
        if num_heads is None:
            return read(start, stop)
        head_rows = num_rows // num_heads
        stop = min(stop, num_rows)
        first, last = start // head_rows, -(-stop // head_rows)
        heads = read(first * head_rows, last * head_rows)
        if not len(heads):
            return heads
        return _reordered(heads, (last - first, -1, 2))[start - first * head_rows : stop - first * head_rows]

    def _rotated_heads(self, name: str) -> int | None:
        """Heads of a query or key matrix of the language model; None for all other tensors."""
        if not name.startswith("model.language_model."):
            return None
        return next((number for leaf, number in self._num_heads.items() if name.endswith(f".{leaf}.weight")), None)


def _reordered(value: Tensor, split: tuple[int, int, int]) -> Tensor:
    """Rows `(h * a * b, n)` as `(h * b * a, n)`, for a split into h, a and b."""
    rows, columns = value.shape
    return value.view(*split, columns).transpose(1, 2).reshape(rows, columns)


def native_params(config: VoxtralConfig, audio: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The contents of `params.json`, with the keys of published files.

    Args:
        config: of the model.
        audio: the section `audio` of its `tekken.json`.
        dtype: precision of the stored weights.
    """
    text, encoder = config.text_config, config.audio_config
    encoding = audio["audio_encoding_config"]
    tokens_per_window = audio["frame_rate"] * audio["chunk_length_s"]
    return {
        **{key: getattr(text, name) for key, name in _TEXT_KEYS.items()},
        "max_seq_len": text.max_position_embeddings,
        "rope_theta": text.rope_parameters["rope_theta"],
        "tied_embeddings": False,
        "dtype": str(dtype).removeprefix("torch."),
        "multimodal": {
            "whisper_model_args": {
                "encoder_args": {
                    "audio_encoding_args": {
                        "sampling_rate": audio["sampling_rate"],
                        "num_mel_bins": encoding["num_mel_bins"],
                        "hop_length": encoding["hop_length"],
                        "window_size": encoding["window_size"],
                    },
                    **{key: getattr(encoder, name) for key, name in _ENCODER_KEYS.items()},
                    "head_dim": encoder.hidden_size // encoder.num_attention_heads,
                },
                "downsample_args": {"downsample_factor": round(encoder.max_source_positions / tokens_per_window)},
            }
        },
    }


def config_of_native(folder: Path) -> VoxtralConfig:
    """The configuration that a folder's `params.json` describes. Ids of special tokens are the same in every Voxtral.

    Raises:
        KeyError: `params.json` lacks a key, so that it is not of a Voxtral model.
        TypeError, AttributeError: a value is of another type than in Voxtral models.
        ValueError: a file is not valid JSON, or the weights are quantized.
        OSError: a file is missing.
    """
    params = json.loads((folder / NATIVE_PARAMS).read_text(encoding="utf-8"))
    if params.get("quantization"):
        raise ValueError("its weights are quantized: take the model that it was made from")
    encoder = params["multimodal"]["whisper_model_args"]["encoder_args"]
    dtype = params.get("dtype", "bfloat16")
    text = {name: params[key] for key, name in _TEXT_KEYS.items() if key != "max_position_embeddings"}
    return VoxtralConfig.from_dict(
        {
            "audio_config": {
                "model_type": "voxtral_encoder",
                **{name: encoder[key] for key, name in _ENCODER_KEYS.items() if key in encoder},
                "num_mel_bins": encoder["audio_encoding_args"]["num_mel_bins"],
                "dtype": dtype,
            },
            "text_config": {
                "model_type": "llama",
                **text,
                "max_position_embeddings": _positions(params),
                "rope_parameters": {"rope_type": "default", "rope_theta": params["rope_theta"]},
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 11,
                "dtype": dtype,
            },
            "audio_token_id": 24,
            "projector_hidden_act": "gelu",
            "dtype": dtype,
        }
    )


def feature_extractor_of_native(folder: Path) -> WhisperFeatureExtractor:
    """The features that the section `audio` of a folder's `tekken.json` describes.

    Raises:
        KeyError: the section lacks a key.
        ValueError: the file is not valid JSON.
        OSError: the file is missing.
    """
    return feature_extractor(json.loads((folder / "tekken.json").read_text(encoding="utf-8"))["audio"])


def feature_extractor(audio: Mapping[str, Any]) -> WhisperFeatureExtractor:
    """An extractor whose sizes are integers for windows of whole seconds, from the section `audio` of a `tekken.json`.

    It multiplies `chunk_length` by the sampling rate. For other windows, pass `max_length=` in samples to its calls.
    """
    seconds, encoding = audio["chunk_length_s"], audio["audio_encoding_config"]
    return WhisperFeatureExtractor.from_dict(
        {
            "feature_size": encoding["num_mel_bins"],
            "sampling_rate": audio["sampling_rate"],
            "hop_length": encoding["hop_length"],
            "n_fft": encoding["window_size"],
            "chunk_length": int(seconds) if float(seconds).is_integer() else seconds,
        }
    )
