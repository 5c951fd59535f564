"""One model in the layouts of transformers and of Mistral: same numbers, names that other software looks for."""

from __future__ import annotations

import json
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoProcessor, VoxtralForConditionalGeneration

from voxtral_dist.config import LoraConfig, ModelConfig, TrainableConfig
from voxtral_dist.exports.model_folders import BaseModel, HuggingFaceFolder, NativeFolder, write_model_folders
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.model.voxtral import read_voxtral_config
from voxtral_dist.model.weights import InitialWeights, fingerprint, load_voxtral

# Names of tensors in the native layout and in folders of Hugging Face, by the first rule of transformers' own converter
# that matches (src/transformers/models/voxtral/convert_voxtral_weights_to_hf.py at commit 1505215d).
CONVERTER_RULES = (
    (r"^output.weight", r"language_model.lm_head.weight"),
    (r"^norm.weight", r"language_model.model.norm.weight"),
    (r"^layers.(\d+).attention_norm.weight", r"language_model.model.layers.\1.input_layernorm.weight"),
    (r"^layers.(\d+).ffn_norm.weight", r"language_model.model.layers.\1.post_attention_layernorm.weight"),
    (r"^layers.(\d+).attention.w(q|k|v|o).weight", r"language_model.model.layers.\1.self_attn.\2_proj.weight"),
    (r"^layers.(\d+).feed_forward.w1.weight", r"language_model.model.layers.\1.mlp.gate_proj.weight"),
    (r"^layers.(\d+).feed_forward.w2.weight", r"language_model.model.layers.\1.mlp.down_proj.weight"),
    (r"^layers.(\d+).feed_forward.w3.weight", r"language_model.model.layers.\1.mlp.up_proj.weight"),
    (r"^mm_whisper_embeddings.tok_embeddings.weight", r"language_model.model.embed_tokens.weight"),
    (r"E\.conv_layers\.0\.(weight|bias)", r"audio_tower.conv1.\1"),
    (r"E\.conv_layers\.1\.(weight|bias)", r"audio_tower.conv2.\1"),
    (r"E\.transformer\.norm\.(weight|bias)", r"audio_tower.layer_norm.\1"),
    (r"E\.transformer\.layers\.(\d+)\.attention\.w([qkv])\.(\w+)", r"audio_tower.layers.\1.self_attn.\2_proj.\3"),
    (r"E\.transformer\.layers\.(\d+)\.attention\.wo\.(\w+)", r"audio_tower.layers.\1.self_attn.out_proj.\2"),
    (r"E\.transformer\.layers\.(\d+)\.attention_norm\.(\w+)", r"audio_tower.layers.\1.self_attn_layer_norm.\2"),
    (r"E\.transformer\.layers\.(\d+)\.feed_forward\.w1\.(\w+)", r"audio_tower.layers.\1.fc1.\2"),
    (r"E\.transformer\.layers\.(\d+)\.feed_forward\.w2\.(\w+)", r"audio_tower.layers.\1.fc2.\2"),
    (r"E\.transformer\.layers\.(\d+)\.ffn_norm\.(\w+)", r"audio_tower.layers.\1.final_layer_norm.\2"),
    (r"mm_whisper_embeddings\.audio_language_projection\.0\.weight", r"multi_modal_projector.linear_1.weight"),
    (r"mm_whisper_embeddings\.audio_language_projection\.2\.weight", r"multi_modal_projector.linear_2.weight"),
)
STORED_POSITIONS = "audio_tower.embed_positions.weight"
ENCODER = r"mm_whisper_embeddings\.whisper_encoder"


def converted(name: str) -> str:
    """The name that transformers' converter gives a native tensor."""
    for pattern, replacement in CONVERTER_RULES:
        new, count = re.subn(pattern.replace("E", ENCODER, 1) if pattern[0] == "E" else pattern, replacement, name)
        if count:
            return new
    raise AssertionError(f"{name} is not known to transformers' converter")


def half_split(value: Tensor, num_heads: int) -> Tensor:
    """Rows in the order of Hugging Face, as the converter's `permute_for_rope` makes it, written out row by row."""
    head_rows = value.shape[0] // num_heads
    order = [head * head_rows + pair for head in range(num_heads) for pair in _first_then_second(head_rows)]
    return value[order]


def _first_then_second(head_rows: int) -> Iterator[int]:
    yield from range(0, head_rows, 2)
    yield from range(1, head_rows, 2)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def weights_of(path: Path) -> Iterator[tuple[str, Tensor]]:
    model = load_voxtral(ModelConfig(path=str(path), precision="float32"))
    return ((name, parameter.detach()) for name, parameter in model.named_parameters())


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    """The tiny model in both layouts."""
    out = tmp_path_factory.mktemp("exports")
    written: dict[Any, Path] = {"hf": out / "export", "mistral": out / "export-mistral"}
    write_model_folders(weights_of(tiny_model), BaseModel.from_pretrained(str(tiny_model)), torch.float32, written)
    return written


def test_what_transformers_converts_from_our_native_folder_is_the_model_bit_for_bit(
    folders: dict[str, Path], tiny_model: Path
) -> None:
    text = read_voxtral_config(str(tiny_model)).text_config
    heads = {".wq.weight": text.num_attention_heads, ".wk.weight": text.num_key_value_heads}
    model = load_file(tiny_model / "model.safetensors")
    native = tensors_of(folders["mistral"])
    for name, value in native.items():
        num_heads = heads.get(name[-len(".wq.weight") :]) if name.startswith("layers.") else None
        expected = model.pop(converted(name))
        assert torch.equal(value if num_heads is None else half_split(value, num_heads), expected), name
    # The converter computes these.
    assert model.keys() == {STORED_POSITIONS}


def test_the_native_folder_is_read_as_the_model_that_was_written(folders: dict[str, Path], tiny_model: Path) -> None:
    theirs = dict(weights_of(tiny_model))
    ours = dict(weights_of(folders["mistral"]))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@torch.no_grad()
def test_the_model_of_the_native_folder_has_the_logits_of_the_model(folders: dict[str, Path], tiny_model: Path) -> None:
    prompts = VoxtralPrompts.from_pretrained(str(tiny_model))
    ids = torch.tensor([prompts.transcription("en", 1)])
    mel = torch.randn(1, 128, prompts.window_samples // 160, generator=torch.Generator().manual_seed(0))
    own, native = (
        load_voxtral(ModelConfig(path=str(path), precision="float32")).eval()(input_ids=ids, input_features=mel).logits
        for path in (tiny_model, folders["mistral"])
    )
    assert own.isfinite().all()
    assert torch.equal(own, native)


def test_adapters_start_from_a_native_folder_as_from_the_model(folders: dict[str, Path], tiny_model: Path) -> None:
    lora = LoraConfig(use_dora=True, targets={"encoder": ("q_proj",), "language_model": ("q_proj", "up_proj")})
    theirs, ours = (
        load_voxtral(ModelConfig(path=str(path), precision="float32"), TrainableConfig(lora=lora))
        for path in (tiny_model, folders["mistral"])
    )
    for (name, value), other in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(value, other), name


def test_rows_of_a_native_tensor_are_a_part_of_the_whole(folders: dict[str, Path], tiny_model: Path) -> None:
    config = ModelConfig(path=str(folders["mistral"]), precision="float32")
    weights = InitialWeights(config.path, load_voxtral(config), seed=0)
    whole = dict(weights_of(tiny_model))
    for name in ("q_proj", "k_proj", "o_proj"):
        full = f"model.language_model.layers.0.self_attn.{name}.weight"
        for start, stop in ((0, 7), (5, 60), (len(whole[full]) - 1, len(whole[full])), (3, 3)):
            assert torch.equal(weights.rows(full, start, stop), whole[full][start:stop])


def test_a_native_folder_has_the_prompts_features_and_configuration_of_the_model(
    folders: dict[str, Path], tiny_model: Path
) -> None:
    theirs, ours = (VoxtralPrompts.from_pretrained(str(path)) for path in (tiny_model, folders["mistral"]))
    assert ours.transcription("en", 2) == theirs.transcription("en", 2)
    assert ours.max_positions == theirs.max_positions
    audio = torch.randint(-1000, 1000, (1, ours.window_samples), dtype=torch.int16)
    mels = [
        LogMel.from_pretrained(str(path), torch.device("cpu"))(audio, [1]) for path in (tiny_model, folders["mistral"])
    ]
    assert torch.equal(*mels)
    native, own = (read_voxtral_config(str(path)) for path in (folders["mistral"], tiny_model))
    for part in ("audio_config", "text_config"):
        assert getattr(native, part).to_dict() == getattr(own, part).to_dict()
    assert fingerprint(str(folders["mistral"])) != fingerprint(str(tiny_model))


def test_params_name_what_published_files_name(folders: dict[str, Path]) -> None:
    params = json.loads((folders["mistral"] / "params.json").read_text())
    assert params.keys() == {
        *("dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "rope_theta", "norm_eps", "vocab_size"),
        *("tied_embeddings", "max_seq_len", "max_position_embeddings", "dtype", "multimodal"),
    }
    whisper = params["multimodal"]["whisper_model_args"]
    assert whisper["encoder_args"].keys() == {
        *("audio_encoding_args", "dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "vocab_size"),
        "max_source_positions",
    }
    assert whisper["encoder_args"]["audio_encoding_args"] == {
        "sampling_rate": 16_000,
        "num_mel_bins": 128,
        "hop_length": 160,
        "window_size": 400,
    }
    assert whisper["downsample_args"] == {"downsample_factor": 4}


def test_a_base_with_params_keeps_its_own_but_for_the_precision(
    folders: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    both = tmp_path / "both"
    shutil.copytree(tiny_model, both)
    own = json.loads((folders["mistral"] / "params.json").read_text()) | {"max_position_embeddings": 1234, "new": [1]}
    (both / "params.json").write_text(json.dumps(own))
    base = BaseModel.from_pretrained(str(both))
    write_model_folders(weights_of(both), base, torch.bfloat16, {"mistral": tmp_path / "native"})
    assert json.loads((tmp_path / "native" / "params.json").read_text()) == own | {"dtype": "bfloat16"}


def test_the_export_for_transformers_has_the_names_and_the_configuration_of_the_base(
    folders: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    assert (folders["hf"] / "config.json").read_bytes() == (tiny_model / "config.json").read_bytes()
    VoxtralForConditionalGeneration.from_pretrained(tiny_model).save_pretrained(tmp_path / "theirs")
    theirs, ours = tensors_of(tmp_path / "theirs"), tensors_of(folders["hf"])
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_another_precision_is_stated_wherever_the_base_states_one(tiny_model: Path, tmp_path: Path) -> None:
    base = BaseModel.from_pretrained(str(tiny_model))
    write_model_folders(weights_of(tiny_model), base, torch.bfloat16, {"hf": tmp_path / "export"})
    model = VoxtralForConditionalGeneration.from_pretrained(tmp_path / "export", dtype="auto")
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    # transformers keeps positions in float32, whatever the rest has.
    assert dtypes.pop("model.audio_tower.embed_positions.weight") is torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}
    assert torch.equal(
        model.model.audio_tower.embed_positions.weight, load_file(tiny_model / "model.safetensors")[STORED_POSITIONS]
    )
    own, exported = (json.loads((path / "config.json").read_text()) for path in (tiny_model, tmp_path / "export"))
    assert "float32" not in json.dumps(exported)
    assert json.dumps(own).replace("float32", "bfloat16") == json.dumps(exported)


def test_a_native_base_yields_a_folder_for_transformers(
    folders: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    base = BaseModel.from_pretrained(str(folders["mistral"]))
    write_model_folders(weights_of(folders["mistral"]), base, torch.float32, {"hf": tmp_path / "export"})
    model = VoxtralForConditionalGeneration.from_pretrained(tmp_path / "export")
    expected = VoxtralForConditionalGeneration.from_pretrained(tiny_model)
    for (name, value), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(value, theirs), name
    assert model.generation_config.eos_token_id == expected.generation_config.eos_token_id
    AutoProcessor.from_pretrained(tmp_path / "export")


@pytest.mark.parametrize(("writer", "stem"), [(HuggingFaceFolder, "model"), (NativeFolder, "consolidated")])
def test_large_models_are_written_in_several_files_that_everybody_may_read(
    writer: type[HuggingFaceFolder | NativeFolder], stem: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = writer(tmp_path, BaseModel.from_pretrained(str(tiny_model)), torch.float32, max_file_bytes=200_000)
    for name, value in weights_of(tiny_model):
        folder.add(name, value)
    folder.close()
    index = json.loads((tmp_path / f"{stem}.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob(f"{stem}-*.safetensors"))
    assert len(files) > 2
    assert {path.name for path in files} == set(index["weight_map"].values())
    for path in files:
        with safe_open(path, framework="pt") as file:
            assert set(file.keys()) == {name for name, place in index["weight_map"].items() if place == path.name}
        assert stat.S_IMODE(path.stat().st_mode) & stat.S_IRGRP
    # Both layouts are read back from several files.
    expected = dict(weights_of(tiny_model))
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(tmp_path))
