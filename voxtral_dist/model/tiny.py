"""A tiny but real Voxtral in a Hugging Face folder: for tests, demos and dry runs without a download.

It has the classes, file names, prompt format and special token ids of the published models, so whatever reads those
reads this one too. Only its widths, its vocabulary and its window are smaller.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from mistral_common.tokens.tokenizers.base import SpecialTokens
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from torch import nn
from transformers import GenerationConfig, VoxtralConfig, VoxtralForConditionalGeneration
from transformers.models.whisper.modeling_whisper import sinusoids

from voxtral_dist.errors import UserError
from voxtral_dist.model.native import feature_extractor
from voxtral_dist.model.saving import usual_permissions
from voxtral_dist.model.tekken import (
    AUDIO_TOKENS_PER_SECOND,
    MAX_VOCAB_SIZE,
    NUM_BYTE_TOKENS,
    NUM_MEL_BINS,
    NUM_SPECIAL_TOKENS,
    POSITIONS_PER_AUDIO_TOKEN,
    tekken_json,
)
from voxtral_dist.model.voxtral import POSITIONS_PER_SECOND


@dataclass(frozen=True)
class TinyShape:
    """The sizes of a tiny Voxtral. The encoder's feed-forward width follows from others: see `encoder_ffn_width`.

    Example:
        >>> from voxtral_dist import TinyShape
        >>> shape = TinyShape(window_seconds=1.28, text_layers=1)
        >>> shape.num_audio_tokens
        16
    """

    window_seconds: float = 1.6
    vocab_size: int = 1024  # special tokens, 256 bytes, and the most frequent merges
    encoder_width: int = 96
    encoder_layers: int = 3
    encoder_heads: int = 4
    text_width: int = 96
    text_layers: int = 2
    text_heads: int = 4
    text_kv_heads: int = 4
    text_ffn_width: int = 192
    max_text_positions: int = 4096
    rope_theta: float = 10_000.0
    initializer_gain: float = 1.0  # standard deviation of a weight times the square root of its fan-in

    def __post_init__(self) -> None:
        for name, size in asdict(self).items():
            if size <= 0:
                raise ValueError(f"`{name}` must be positive, but is {size} instead.")
        if self.text_width % (2 * self.text_heads) or self.encoder_width % (2 * self.encoder_heads):
            # Rotary embeddings rotate pairs.
            raise ValueError("`text_width` and `encoder_width` must be even multiples of their numbers of heads.")
        if self.text_heads % self.text_kv_heads:
            raise ValueError("`text_heads` must be a multiple of `text_kv_heads`.")
        if (Fraction(str(self.window_seconds)) * POSITIONS_PER_SECOND) % POSITIONS_PER_AUDIO_TOKEN != 0:
            raise ValueError(
                f"`window_seconds` must be a multiple of {1 / AUDIO_TOKENS_PER_SECOND} s, a whole number of audio "
                f"tokens, but is {self.window_seconds} instead."
            )
        if not NUM_SPECIAL_TOKENS + NUM_BYTE_TOKENS <= self.vocab_size <= MAX_VOCAB_SIZE:
            raise ValueError(
                f"`vocab_size` must be from {NUM_SPECIAL_TOKENS + NUM_BYTE_TOKENS} (the special tokens and every byte) "
                f"to {MAX_VOCAB_SIZE}, but is {self.vocab_size} instead."
            )

    @property
    def num_positions(self) -> int:
        """Encoder positions of a window: 1,500 for 30 s."""
        return round(self.window_seconds * POSITIONS_PER_SECOND)

    @property
    def num_audio_tokens(self) -> int:
        """Audio tokens of a window: 375 for 30 s."""
        return self.num_positions // POSITIONS_PER_AUDIO_TOKEN

    @property
    def encoder_ffn_width(self) -> int:
        """Four times the width: the model uses it as the size of the positions that form one audio token."""
        return POSITIONS_PER_AUDIO_TOKEN * self.encoder_width


def tiny_shape(overrides: Sequence[str] = ()) -> TinyShape:
    """The default shape with some fields replaced, each given as `name=number`.

    Raises:
        UserError: there is no such field, or its value is out of range.
    """
    shape = TinyShape()
    for override in overrides:
        name, _, text = override.partition("=")
        current = asdict(shape).get(name)
        if current is None:
            raise UserError(f"`--set {override}`: a tiny Voxtral has the sizes {', '.join(asdict(shape))}.")
        try:
            sizes = asdict(shape) | {name: type(current)(text)}
            shape = TinyShape(**sizes)
        except ValueError as error:
            raise UserError(f"`--set {override}`: {error}") from error
    return shape


def build_tiny_voxtral(out_dir: Path, shape: TinyShape = TinyShape(), seed: int = 0) -> None:
    """Write tokenizer, processor, configuration and float32 weights; the same bytes for the same shape and seed.

    Example:
        >>> from pathlib import Path
        >>> from voxtral_dist import TinyShape, build_tiny_voxtral
        >>> build_tiny_voxtral(Path("models/tinier"), TinyShape(text_layers=1))
        >>> Path("models/tinier/tekken.json").is_file()
        True
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    tekken_path = out_dir / "tekken.json"
    tekken = tekken_json(shape.vocab_size, shape.window_seconds)
    tekken_path.write_text(json.dumps(tekken, ensure_ascii=False), encoding="utf-8")
    tokenizer = Tekkenizer.from_file(tekken_path)
    feature_extractor(tekken["audio"]).save_pretrained(out_dir)
    model = build_random_voxtral(_model_config(tokenizer, shape), shape.initializer_gain, seed)
    with usual_permissions(out_dir / "model.safetensors"):
        model.save_pretrained(out_dir)
    _generation_config(tokenizer).save_pretrained(out_dir)


def _model_config(tokenizer: Tekkenizer, shape: TinyShape) -> VoxtralConfig:
    return VoxtralConfig.from_dict(
        {
            "audio_config": _encoder_config(shape),
            "text_config": _text_config(tokenizer, shape),
            "audio_token_id": tokenizer.get_special_token(SpecialTokens.audio),
            "projector_hidden_act": "gelu",
            "dtype": "float32",
        }
    )


def _encoder_config(shape: TinyShape) -> dict[str, Any]:
    return {
        "model_type": "voxtral_encoder",
        "num_mel_bins": NUM_MEL_BINS,
        "max_source_positions": shape.num_positions,
        "hidden_size": shape.encoder_width,
        "num_hidden_layers": shape.encoder_layers,
        "num_attention_heads": shape.encoder_heads,
        "intermediate_size": shape.encoder_ffn_width,
        "dtype": "float32",
    }


def _text_config(tokenizer: Tekkenizer, shape: TinyShape) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.text_width,
        "num_hidden_layers": shape.text_layers,
        "num_attention_heads": shape.text_heads,
        "num_key_value_heads": shape.text_kv_heads,
        "head_dim": shape.text_width // shape.text_heads,
        "intermediate_size": shape.text_ffn_width,
        "max_position_embeddings": shape.max_text_positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "dtype": "float32",
    }


def _generation_config(tokenizer: Tekkenizer) -> GenerationConfig:
    return GenerationConfig.from_dict(
        {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id,
        }
    )


def build_random_voxtral(config: VoxtralConfig, gain: float, seed: int) -> VoxtralForConditionalGeneration:
    """A model to train from scratch: weights scaled by their fan-in, and Whisper's sinusoids as encoder positions.

    The standard deviation of transformers, 0.02, suits widths of thousands; at 96 it needs more than twice the steps to
    learn to use the audio.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VoxtralForConditionalGeneration(config)
        for module in model.modules():
            _initialize(module, gain)
    positions = model.model.audio_tower.embed_positions.weight
    positions.data.copy_(sinusoids(*positions.shape))
    return model


def _initialize(module: nn.Module, gain: float) -> None:
    if isinstance(module, (nn.Linear, nn.Conv1d)):
        fan_in = module.weight[0].numel()
        nn.init.normal_(module.weight, std=gain / math.sqrt(fan_in))
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=gain)
