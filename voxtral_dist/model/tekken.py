"""Voxtral's `tekken.json`, made from the vocabulary that mistral-common brings."""

import base64
import json
from pathlib import Path
from typing import Any

import mistral_common
from mistral_common.tokens.tokenizers.base import SpecialTokens
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from voxtral_dist.model.voxtral import HOP_SAMPLES, POSITIONS_PER_SECOND, SAMPLING_RATE

FFT_SAMPLES = 400
NUM_MEL_BINS = 128
POSITIONS_PER_AUDIO_TOKEN = 4
AUDIO_TOKENS_PER_SECOND = POSITIONS_PER_SECOND / POSITIONS_PER_AUDIO_TOKEN

_PACKAGED_VOCABULARY = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
NUM_BYTE_TOKENS = 256
MAX_VOCAB_SIZE = 131_072
# The published ids of the tokens that Voxtral adds to the 20 special tokens of every version 7 tokenizer.
_AUDIO_SPECIAL_TOKEN_IDS = {SpecialTokens.audio: 24, SpecialTokens.begin_audio: 25, SpecialTokens.transcribe: 34}
NUM_SPECIAL_TOKENS = 1 + max(_AUDIO_SPECIAL_TOKEN_IDS.values())


def tekken_json(vocab_size: int, window_seconds: float, num_special_tokens: int = NUM_SPECIAL_TOKENS) -> dict[str, Any]:
    """The content of a `tekken.json`: special tokens, then the most frequent merges of the packaged vocabulary.

    By the order of BPE ranks, every prefix of a vocabulary is a complete one.

    Args:
        vocab_size: number of special tokens, bytes and merges.
        window_seconds: duration of the encoder's window.
        num_special_tokens: ids before that of the first byte; those without a meaning are filled in by mistral-common.
    """
    packaged = json.loads(_PACKAGED_VOCABULARY.read_text(encoding="utf-8"))
    num_vocab_tokens = vocab_size - num_special_tokens
    vocabulary = packaged["vocab"][:num_vocab_tokens]
    assert len(base64.b64decode(vocabulary[NUM_BYTE_TOKENS - 1]["token_bytes"])) == 1
    return {
        "config": {
            "pattern": packaged["config"]["pattern"],
            "num_vocab_tokens": num_vocab_tokens,
            "default_vocab_size": vocab_size,
            "default_num_special_tokens": num_special_tokens,
            "version": "v7",
        },
        "vocab": vocabulary,
        "special_tokens": _special_tokens(),
        "audio": _audio_section(window_seconds),
    }


def _special_tokens() -> list[dict[str, Any]]:
    """The 20 tokens of version 7 and Voxtral's three at their published ids, with fillers in between."""
    names = {token["rank"]: str(token["token_str"]) for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS}
    names |= {rank: str(name) for name, rank in _AUDIO_SPECIAL_TOKEN_IDS.items()}
    return [
        {"rank": rank, "token_str": names.get(rank, f"<SPECIAL_{rank}>"), "is_control": True}
        for rank in range(NUM_SPECIAL_TOKENS)
    ]


def _audio_section(window_seconds: float) -> dict[str, Any]:
    return {
        "sampling_rate": SAMPLING_RATE,
        "frame_rate": AUDIO_TOKENS_PER_SECOND,
        "audio_encoding_config": {
            "num_mel_bins": NUM_MEL_BINS,
            "hop_length": HOP_SAMPLES,
            "window_size": FFT_SAMPLES,
        },
        "chunk_length_s": window_seconds,
    }
