"""What vLLM makes of our native layout: every tensor has a place in its model, with the rows that it expects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Size, Tensor

from voxtral_dist.exports.model_folders import BaseModel, native_shapes, write_model_folders
from voxtral_dist.model.native import native_params
from voxtral_dist.model.published import MINI, SMALL, published_config
from voxtral_dist.model.tekken import tekken_json
from voxtral_dist.model.voxtral import meta_model, read_voxtral_config
from voxtral_dist.model.weights import InitialWeights

from vllm_names import vllm_parameter, vllm_parameters

NUM_ENCODER_BLOCKS, ENCODER_WIDTH, ENCODER_FFN_WIDTH, NUM_MELS = 32, 1280, 5120, 128
VOCABULARY, QUERY_WIDTH, KEY_WIDTH = 131_072, 32 * 128, 8 * 128
# name, blocks, width and feed-forward width of the language model, tensors of the published file.
PUBLISHED = [(MINI, 30, 3072, 8192, 761), (SMALL, 40, 5120, 32_768, 851)]


def published_shapes(num_blocks: int, width: int, ffn_width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a published `consolidated.safetensors`, written out."""
    encoder, embeddings = "mm_whisper_embeddings.whisper_encoder", "mm_whisper_embeddings"
    shapes: dict[str, tuple[int, ...]] = {
        "output.weight": (VOCABULARY, width),
        "norm.weight": (width,),
        f"{embeddings}.tok_embeddings.weight": (VOCABULARY, width),
        f"{embeddings}.audio_language_projection.0.weight": (width, 4 * ENCODER_WIDTH),
        f"{embeddings}.audio_language_projection.2.weight": (width, width),
        f"{encoder}.conv_layers.0.weight": (ENCODER_WIDTH, NUM_MELS, 3),
        f"{encoder}.conv_layers.1.weight": (ENCODER_WIDTH, ENCODER_WIDTH, 3),
        f"{encoder}.transformer.norm.weight": (ENCODER_WIDTH,),
    }
    biases = {f"{encoder}.{name}": ENCODER_WIDTH for name in ("conv_layers.0", "conv_layers.1", "transformer.norm")}
    for number in range(num_blocks):
        block = f"layers.{number}"
        shapes |= {f"{block}.{name}.weight": (width,) for name in ("attention_norm", "ffn_norm")}
        shapes |= {f"{block}.attention.{name}.weight": (KEY_WIDTH, width) for name in ("wk", "wv")}
        shapes[f"{block}.attention.wq.weight"] = (QUERY_WIDTH, width)
        shapes[f"{block}.attention.wo.weight"] = (width, QUERY_WIDTH)
        shapes |= {f"{block}.feed_forward.{name}.weight": (ffn_width, width) for name in ("w1", "w3")}
        shapes[f"{block}.feed_forward.w2.weight"] = (width, ffn_width)
    for number in range(NUM_ENCODER_BLOCKS):
        block = f"{encoder}.transformer.layers.{number}"
        shapes |= {f"{block}.attention.w{name}.weight": (ENCODER_WIDTH, ENCODER_WIDTH) for name in "qkvo"}
        shapes |= {f"{block}.{name}.weight": (ENCODER_WIDTH,) for name in ("attention_norm", "ffn_norm")}
        shapes[f"{block}.feed_forward.w1.weight"] = (ENCODER_FFN_WIDTH, ENCODER_WIDTH)
        shapes[f"{block}.feed_forward.w2.weight"] = (ENCODER_WIDTH, ENCODER_FFN_WIDTH)
        with_bias = ("attention.wq", "attention.wv", "attention.wo", "attention_norm", "ffn_norm", "feed_forward.w2")
        biases |= {f"{block}.{name}": ENCODER_WIDTH for name in with_bias}
        biases[f"{block}.feed_forward.w1"] = ENCODER_FFN_WIDTH
    return shapes | {f"{name}.bias": (size,) for name, size in biases.items()}


@pytest.mark.parametrize(("name", "num_blocks", "width", "ffn_width", "num_tensors"), PUBLISHED)
def test_every_native_tensor_has_its_place_in_vllm_and_none_is_missing(
    name: str, num_blocks: int, width: int, ffn_width: int, num_tensors: int
) -> None:
    shapes = {name: parameter.shape for name, parameter in meta_model(published_config(name)).named_parameters()}
    native = native_shapes(shapes)
    assert len(native) == num_tensors
    assert native == {key: Size(shape) for key, shape in published_shapes(num_blocks, width, ffn_width).items()}
    placed = [vllm_parameter(tensor) for tensor in native]
    assert len(set(placed)) == num_tensors
    assert set(placed) == vllm_parameters(NUM_ENCODER_BLOCKS, num_blocks)


def as_vllm_permutes(value: Tensor, num_heads: int, head_dim: int, width: int) -> Tensor:
    """vllm/model_executor/models/mistral.py, `maybe_remap_mistral`: rows of wq and wk of the language model."""
    rows = value.view(num_heads, head_dim // 2, 2, width).transpose(1, 2)
    return rows.reshape(num_heads * head_dim, width)


def test_vllm_puts_the_rows_of_queries_and_keys_where_transformers_has_them(tiny_model: Path, tmp_path: Path) -> None:
    base = BaseModel.from_pretrained(str(tiny_model))
    stored = InitialWeights(str(tiny_model), meta_model(base.config), seed=0)
    write_model_folders(
        ((name, stored(name)) for name in base.shapes), base, torch.float32, {"mistral": tmp_path / "n"}
    )
    native = load_file(tmp_path / "n" / "consolidated.safetensors")
    text = read_voxtral_config(str(tiny_model)).text_config
    for tensor, leaf, heads in (
        ("wq", "q_proj", text.num_attention_heads),
        ("wk", "k_proj", text.num_key_value_heads),
    ):
        value = native[f"layers.1.attention.{tensor}.weight"]
        expected = stored(f"model.language_model.layers.1.self_attn.{leaf}.weight")
        assert not torch.equal(value, expected)
        assert torch.equal(as_vllm_permutes(value, heads, text.head_dim, text.hidden_size), expected)
    assert text.num_attention_heads != text.num_key_value_heads


def test_params_of_mini_are_the_published_ones() -> None:
    audio = tekken_json(1_000, 30.0, 100)["audio"]
    params: dict[str, Any] = native_params(published_config(MINI), audio, torch.bfloat16)
    # vllm/transformers_utils/configs/mistral.py indexes those of the encoder without defaults.
    assert params["multimodal"]["whisper_model_args"] == {
        "encoder_args": {
            "audio_encoding_args": {
                "sampling_rate": 16_000,
                "num_mel_bins": 128,
                "hop_length": 160,
                "window_size": 400,
            },
            "dim": 1280,
            "n_layers": 32,
            "head_dim": 64,
            "hidden_dim": 5120,
            "n_heads": 20,
            "vocab_size": 51_866,
            "max_source_positions": 1500,
        },
        "downsample_args": {"downsample_factor": 4},
    }
    assert {key: value for key, value in params.items() if key != "multimodal"} == {
        "dim": 3072,
        "n_layers": 30,
        "head_dim": 128,
        "hidden_dim": 8192,
        "n_heads": 32,
        "n_kv_heads": 8,
        "rope_theta": 1e8,
        "norm_eps": 1e-5,
        "vocab_size": 131_072,
        "max_position_embeddings": 32_768,
        "max_seq_len": 32_768,
        "tied_embeddings": False,
        "dtype": "bfloat16",
    }
