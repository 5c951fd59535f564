"""A tiny Voxtral is a real one: every library that reads the published folder reads this one."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from transformers import VoxtralConfig, VoxtralForConditionalGeneration, VoxtralProcessor

from voxtral_dist.errors import UserError
from voxtral_dist.model.tiny import TinyShape, build_tiny_voxtral, tiny_shape

from corpora import TINY_SHAPE, tone

SMALL = replace(TINY_SHAPE, window_seconds=0.64, encoder_layers=1, text_layers=1)
SPECIAL_TOKENS = {
    "<unk>": 0,
    "<s>": 1,
    "</s>": 2,
    "[INST]": 3,
    "[/INST]": 4,
    "<pad>": 11,
    "[AUDIO]": 24,
    "[BEGIN_AUDIO]": 25,
    "[TRANSCRIBE]": 34,
}


def test_the_same_shape_and_seed_make_the_same_bytes(tmp_path):
    torch.manual_seed(1)
    build_tiny_voxtral(tmp_path / "a", SMALL, seed=5)
    torch.manual_seed(2)
    build_tiny_voxtral(tmp_path / "b", SMALL, seed=5)
    build_tiny_voxtral(tmp_path / "c", SMALL, seed=6)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in "ac"]
    assert weights[0] != weights[1]


def test_making_one_does_not_touch_the_global_random_state(tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    build_tiny_voxtral(tmp_path / "a", SMALL)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_special_tokens_have_their_published_ids(tiny_model, token):
    text = MistralTokenizer.from_file(str(tiny_model / "tekken.json")).instruct_tokenizer.tokenizer
    assert text.get_special_token(token) == SPECIAL_TOKENS[token]
    assert VoxtralProcessor.from_pretrained(tiny_model).tokenizer.convert_tokens_to_ids(token) == SPECIAL_TOKENS[token]


def test_the_tokenizer_has_the_published_version_and_audio_format(tiny_model):
    tekken = json.loads((tiny_model / "tekken.json").read_text(encoding="utf-8"))
    assert tekken["config"]["version"] == "v7"
    assert tekken["audio"] == {
        "sampling_rate": 16_000,
        "frame_rate": 12.5,
        "audio_encoding_config": {"num_mel_bins": 128, "hop_length": 160, "window_size": 400},
        "chunk_length_s": 1.28,
    }


@pytest.mark.parametrize("folder", ["tiny_model", "real_window_model"])
def test_the_folder_loads_and_generates_by_the_published_classes(folder, request):
    path = request.getfixturevalue(folder)
    processor = VoxtralProcessor.from_pretrained(path)
    model = VoxtralForConditionalGeneration.from_pretrained(path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    positions = model.config.audio_config.max_source_positions
    window_samples = positions * 320
    inputs = processor.apply_transcription_request(
        audio=[tone(0.9).astype(np.float32) / 32768],
        language=["en"],
        model_id=str(path),
        sampling_rate=16_000,
        format=["WAV"],
        audio_kwargs={"pad_to_multiple_of": window_samples, "max_source_positions": 2 * positions},
    )
    assert inputs["input_features"].shape == (1, 128, 2 * positions)
    assert (inputs["input_ids"] == model.config.audio_token_id).sum() == positions // 4
    generated = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert generated.shape[1] <= inputs["input_ids"].shape[1] + 2
    assert model.generation_config.eos_token_id == 2


def test_shape_and_configuration_agree(tiny_model):
    config = VoxtralConfig.from_pretrained(tiny_model)
    assert (TINY_SHAPE.num_positions, TINY_SHAPE.num_audio_tokens) == (64, 16)
    assert config.audio_config.max_source_positions == TINY_SHAPE.num_positions
    assert config.text_config.vocab_size == TINY_SHAPE.vocab_size
    assert (TinyShape(window_seconds=30.0).num_positions, TinyShape(window_seconds=30.0).num_audio_tokens) == (
        1500,
        375,
    )


def test_overrides_keep_the_type_of_a_size():
    shape = tiny_shape(["window_seconds=1.28", "text_width=32"])
    assert shape == TinyShape(window_seconds=1.28, text_width=32)
    assert isinstance(shape.text_width, int)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("colour=3", "a tiny Voxtral has the sizes window_seconds"),
        ("num_positions=3", "a tiny Voxtral has the sizes window_seconds"),
        ("text_width", "text_width"),
        ("text_width=wide", "text_width=wide"),
        ("window_seconds=1.3", "must be a multiple of 0.08 s"),
        ("vocab_size=100", "`vocab_size` must be"),
        # Sizes that no model can have.
        ("window_seconds=-1.28", "window_seconds"),
        ("window_seconds=0", "window_seconds"),
        ("text_heads=0", "text_heads"),
        ("text_heads=5", "`text_width`"),
        ("encoder_width=97", "`encoder_width`"),
        ("text_kv_heads=3", "text_kv_heads"),
        # Rotary embeddings turn pairs: four heads of 25 have none.
        ("text_width=100", "text_width"),
        ("encoder_width=-64", "encoder_width"),
        ("vocab_size=1000000", "vocab_size"),
    ],
)
def test_a_size_that_does_not_fit_is_refused(override, sentence):
    with pytest.raises(UserError) as refused:
        tiny_shape([override])
    assert sentence in str(refused.value)
    assert override in str(refused.value)
