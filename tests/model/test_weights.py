"""Initial weights come from the checkpoint's files, by the names of this version, and damage is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import VoxtralForConditionalGeneration

from voxtral_dist.config import ActivationCheckpointingConfig, ModelConfig, TrainableConfig
from voxtral_dist.errors import UserError
from voxtral_dist.model.voxtral import trained_meta_model
from voxtral_dist.model.weights import InitialWeights, fingerprint, load_voxtral


def initial(path: Path) -> InitialWeights:
    config = ModelConfig(path=str(path), precision="float32")
    return InitialWeights(str(path), trained_meta_model(config, TrainableConfig(), torch.float32), seed=0)


def test_a_model_begins_as_transformers_loads_it(tiny_model):
    ours = load_voxtral(ModelConfig(path=str(tiny_model), precision="float32"))
    theirs = VoxtralForConditionalGeneration.from_pretrained(tiny_model)
    for mine, other in (
        (ours.state_dict(), theirs.state_dict()),
        (dict(ours.named_buffers()), dict(theirs.named_buffers())),
    ):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            assert torch.equal(mine[name], value), name


def test_rows_are_a_part_of_the_whole(tiny_model):
    weights = initial(tiny_model)
    for name in ("lm_head.weight", "model.audio_tower.conv1.bias"):
        whole = weights(name)
        assert torch.equal(torch.cat([weights.rows(name, 0, 5), weights.rows(name, 5, len(whole))]), whole)
        assert len(weights.rows(name, len(whole), len(whole))) == 0


def test_a_checkpoint_in_several_files_is_read_alike(tiny_model, tmp_path):
    sharded = tmp_path / "sharded"
    VoxtralForConditionalGeneration.from_pretrained(tiny_model).save_pretrained(sharded, max_shard_size="200KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    config = ModelConfig(path=str(sharded), precision="float32")
    whole = load_voxtral(ModelConfig(path=str(tiny_model), precision="float32")).state_dict()
    for name, value in load_voxtral(config).state_dict().items():
        assert torch.equal(value, whole[name]), name


def test_fingerprints_tell_other_weights_and_not_other_places(tiny_model, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    assert fingerprint(str(copy)) == fingerprint(str(tiny_model))
    tensors = load_file(copy / "model.safetensors")
    save_file({name: value + 1e-3 for name, value in tensors.items()}, copy / "model.safetensors")
    assert fingerprint(str(copy)) != fingerprint(str(tiny_model))


def test_missing_and_misshapen_weights_and_files_are_named(tiny_model, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    tensors = load_file(copy / "model.safetensors")
    lacking = next(name for name in tensors if name.endswith("lm_head.weight"))
    save_file({name: value for name, value in tensors.items() if name != lacking}, copy / "model.safetensors")
    with pytest.raises(UserError, match=r"must contain `lm_head.weight` .* but do not instead"):
        initial(copy)
    save_file(tensors | {lacking: tensors[lacking][:-1].clone()}, copy / "model.safetensors")
    with pytest.raises(UserError, match=r"must contain `lm_head.weight` with the shape .* but have"):
        initial(copy)
    (copy / "model.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(UserError, match="cannot be read"):
        initial(copy)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"any": "model-00001.safetensors"}}))
    with pytest.raises(UserError, match=r"model-00001.safetensors is missing"):
        initial(copy)


@pytest.mark.parametrize("every", [0, 1, 2])
def test_every_nth_block_is_computed_again_in_the_backward_pass(tiny_model, every):
    checkpointing = ActivationCheckpointingConfig(encoder=every, language_model=every)
    model = load_voxtral(ModelConfig(path=str(tiny_model), precision="float32", activation_checkpointing=checkpointing))
    runs: dict[str, int] = {}
    for part, blocks in (("encoder", model.model.audio_tower.layers), ("text", model.model.language_model.layers)):
        for number, block in enumerate(blocks):
            norm = block.self_attn_layer_norm if part == "encoder" else block.input_layernorm
            key = f"{part}{number}"
            norm.register_forward_hook(lambda *_, key=key: runs.__setitem__(key, runs.get(key, 0) + 1))
    frames = 2 * model.config.audio_config.max_source_positions
    model.get_audio_features(torch.randn(1, 128, frames)).pooler_output.sum().backward()
    model(input_ids=torch.tensor([[1, 3, 300]])).logits.sum().backward()
    for key, count in runs.items():
        number = int(key.lstrip("encodrtx"))
        assert count == (2 if every and number % every == 0 else 1), key
    assert len(runs) == len(model.model.audio_tower.layers) + len(model.model.language_model.layers)
