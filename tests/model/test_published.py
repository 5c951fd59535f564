"""The table of published models, and what goes before it."""

import json
from pathlib import Path

import huggingface_hub
import mistral_common
import pytest
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from voxtral_dist.data.plan.example_sizes import ExampleSizes
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.model.published import (
    MINI,
    PUBLISHED_MODELS,
    SMALL,
    prompts_for_estimates,
    published_config,
    published_prompts,
    published_settings,
    voxtral_config_for_estimates,
)
from voxtral_dist.model.voxtral import audio_tokens_per_window, meta_model, window_seconds


@pytest.mark.parametrize(
    ("name", "num_parameters", "num_stored"), [(MINI, 4_676_271_104, 761), (SMALL, 24_261_800_960, 851)]
)
def test_shapes_are_those_of_the_published_files(name, num_parameters, num_stored):
    parameters = dict(meta_model(published_config(name)).named_parameters())
    assert {parameter.device.type for parameter in parameters.values()} == {"meta"}
    assert sum(parameter.numel() for parameter in parameters.values()) == num_parameters
    # Mistral's own files leave out the positions, which are sinusoids.
    assert len([one for one in parameters if "embed_positions" not in one]) == num_stored


@pytest.mark.parametrize("name", PUBLISHED_MODELS)
def test_prompts_without_files_have_the_published_window_vocabulary_and_positions(name):
    prompts, config = published_prompts(name), published_config(name)
    assert prompts.window_seconds == window_seconds(config) == 30
    assert prompts.audio_tokens_per_window == audio_tokens_per_window(config) == 375
    assert ExampleSizes.of(prompts).max_positions == 32_768
    packaged = Tekkenizer.from_file(Path(mistral_common.__file__).parent / "data" / "tekken_240911.json")
    text = "Straße, 道, naïve: 42 µs."
    assert prompts.encode(text) == packaged.encode(text, bos=False, eos=False)
    # <s> [INST] [BEGIN_AUDIO] [AUDIO] ... [/INST] lang:en [TRANSCRIBE]
    ids = prompts.transcription("en", num_windows=1)
    assert ids[:4] == (1, 3, 25, 24)
    assert ids.index(4) == 3 + 375
    assert ids[-1] == 34


def test_settings_are_the_callers_own():
    published_settings(MINI)["text_config"]["hidden_size"] = 1
    assert published_config(MINI).text_config.hidden_size == 3072


def write_config(folder: Path, num_blocks: int) -> None:
    """Write a config.json that is not the table's."""
    settings = published_settings(MINI) | {"model_type": "voxtral"}
    settings["text_config"]["num_hidden_layers"] = num_blocks
    settings["text_config"]["max_position_embeddings"] = 4096
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")


def test_the_hubs_cache_goes_before_the_table(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / ("models--" + MINI.replace("/", "--"))
    snapshot = repository / "snapshots" / "0123abcd"
    write_config(snapshot, num_blocks=2)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    assert voxtral_config_for_estimates(MINI).text_config.num_hidden_layers == 2
    assert voxtral_config_for_estimates(SMALL).text_config.num_hidden_layers == 40
    assert prompts_for_estimates(MINI).window_seconds == 30, "without a tokenizer in the cache"
    (snapshot / "tekken.json").write_bytes((tiny_model / "tekken.json").read_bytes())
    cached = prompts_for_estimates(MINI)
    assert (cached.window_seconds, cached.max_positions) == (
        VoxtralPrompts.from_pretrained(str(tiny_model)).window_seconds,
        4096,
    )


def test_a_folder_goes_before_the_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / MINI, num_blocks=3)
    assert voxtral_config_for_estimates(MINI).text_config.num_hidden_layers == 3
