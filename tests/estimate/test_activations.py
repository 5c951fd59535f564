"""The formulas of activations equal what autograd keeps, block by block."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from voxtral_dist.config import ActivationCheckpointingConfig, LoraConfig, ModelConfig, TrainableConfig
from voxtral_dist.estimate.activations import Activations, MicroBatchShape
from voxtral_dist.estimate.parts import Part, backward_peak, forward_peak
from voxtral_dist.model.tiny import TinyShape, build_tiny_voxtral
from voxtral_dist.model.voxtral import DTYPES, TrainedVoxtral, initialize_buffers, trained_meta_model

SHAPE = TinyShape(
    window_seconds=1.28,
    vocab_size=512,
    encoder_width=96,
    encoder_layers=2,
    encoder_heads=4,
    text_width=128,
    text_layers=2,
    text_heads=8,
    text_kv_heads=2,
    text_ffn_width=208,
)
WINDOWS, POSITIONS, TARGETS = 3, 50, 30
TRAINABLES = {
    "all": TrainableConfig(),
    "no language model": TrainableConfig(frozen=("language_model",)),
    "no encoder": TrainableConfig(frozen=("encoder",)),
    "adapters": TrainableConfig(lora=LoraConfig(rank=4)),
    "adapters everywhere": TrainableConfig(
        lora=LoraConfig(rank=4, targets={"encoder": ("q_proj", "fc2"), "language_model": ("v_proj", "down_proj")})
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders: of `SHAPE`, and with one more block in each component."""
    shapes = {
        "base": SHAPE,
        "encoder": replace(SHAPE, encoder_layers=3),
        "language_model": replace(SHAPE, text_layers=3),
    }
    folders = {name: tmp_path_factory.mktemp("models") / name for name in shapes}
    for name, shape in shapes.items():
        build_tiny_voxtral(folders[name], shape)
    return folders


def model_of(path: Path, trainable: TrainableConfig, **settings: Any) -> tuple[TrainedVoxtral, ModelConfig]:
    """Random weights on the CPU."""
    config = ModelConfig(path=str(path), **{"precision": "float32"} | settings)
    model = trained_meta_model(config, trainable, DTYPES[config.precision])
    model.to_empty(device="cpu")
    initialize_buffers(model, torch.device("cpu"))
    for buffer_owner in model.modules():
        for name, buffer in buffer_owner.named_buffers(recurse=False):
            setattr(buffer_owner, name, torch.ones_like(buffer))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    return model, config


def kept_by_autograd(model: TrainedVoxtral) -> int:
    """Bytes of all tensors that the forward pass keeps, without parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    own |= {buffer.untyped_storage().data_ptr() for buffer in model.buffers()}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    audio_tokens = SHAPE.num_audio_tokens
    ids = torch.full((WINDOWS, POSITIONS), 40)
    ids[:, 10 : 10 + audio_tokens] = model.config.audio_token_id
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = torch.randn(WINDOWS, 128, 2 * SHAPE.num_positions).to(model.lm_head.weight.dtype)
        audio = model.model.get_audio_features(features, return_dict=True).pooler_output
        held = model.causal_states(ids, audio, (ids.flatten() == model.config.audio_token_id).nonzero()[:, 0])
        assert held.requires_grad
    return sum(sizes.values())


def planned(model: TrainedVoxtral, config: ModelConfig) -> list[Part]:
    return Activations(model, config).parts(MicroBatchShape(WINDOWS, WINDOWS, POSITIONS, TARGETS))


@pytest.mark.parametrize("component", ["encoder", "language_model"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("trainable", TRAINABLES)
def test_a_block_more_keeps_what_the_formula_says(models, component, precision, trainable):
    kept = []
    for name in ("base", component):
        model, config = model_of(models[name], TRAINABLES[trainable], precision=precision)
        kept.append((kept_by_autograd(model), sum(part.kept for part in planned(model, config))))
    (before, planned_before), (after, planned_after) = kept
    # Means and deviations of norms are in half precision on a CPU.
    assert planned_after - planned_before == pytest.approx(after - before, rel=0.01, abs=1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_whole_model_keeps_what_the_formulas_say(models, attention):
    model, config = model_of(models["base"], TrainableConfig(), attention=attention)
    parts = planned(model, config)
    states_of_targets = TARGETS * SHAPE.text_width * 4
    assert sum(part.kept for part in parts) - states_of_targets == pytest.approx(kept_by_autograd(model), rel=0.02)


def test_what_needs_no_gradient_keeps_nothing(models):
    model, config = model_of(models["base"], TRAINABLES["no encoder"])
    names = {part.name: part for part in planned(model, config)}
    assert names["encoder convolutions"].kept == names["encoder block"].kept == 0
    assert names["projector"].kept > 0


def test_checkpointed_blocks_keep_their_input_and_compute_the_rest_again(models):
    model, config = model_of(models["base"], TrainableConfig())
    every_other = ActivationCheckpointingConfig(encoder=2, language_model=1)
    plain = planned(model, config)
    saving = planned(model, config.model_copy(update={"activation_checkpointing": every_other}))
    encoder = [(before, after) for before, after in zip(plain, saving, strict=True) if after.name == "encoder block"]
    (first, first_saving), (second, second_saving) = encoder
    assert second_saving == second
    assert first_saving.kept == WINDOWS * SHAPE.num_positions * SHAPE.encoder_width * 4
    assert first_saving.again == first.kept
    assert backward_peak(saving) < backward_peak(plain)
    assert sum(part.num_trained for part in saving) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("trainable", ["all", "no encoder", "adapters"])
def test_a_block_with_chunks_of_its_mlp_keeps_what_the_formula_says(models, trainable):
    kept = []
    for name in ("base", "language_model"):
        model, config = model_of(models[name], TRAINABLES[trainable], mlp_chunk_tokens=40)
        kept.append((kept_by_autograd(model), sum(part.kept for part in planned(model, config))))
    (before, planned_before), (after, planned_after) = kept
    assert planned_after - planned_before == pytest.approx(after - before, rel=0.01)


def test_chunks_of_mlps_are_recomputed_one_at_a_time(models):
    model, config = model_of(models["base"], TrainableConfig())
    checkpointed = config.model_copy(
        update={"activation_checkpointing": ActivationCheckpointingConfig(language_model=1)}
    )
    whole, quarter = (
        next(part for part in planned(model, one) if part.name == "language block")
        for one in (checkpointed, checkpointed.model_copy(update={"mlp_chunk_tokens": -(-WINDOWS * POSITIONS // 4)}))
    )
    intermediate = 4 * 4 * SHAPE.text_ffn_width * WINDOWS * POSITIONS
    assert whole.kept == quarter.kept
    assert whole.again + whole.working - quarter.again - quarter.working > 0.7 * intermediate


def test_offloaded_inputs_are_in_host_memory_and_two_of_them_on_the_device(models):
    model, config = model_of(models["base"], TrainableConfig())
    checkpointed = config.model_copy(
        update={"activation_checkpointing": ActivationCheckpointingConfig(language_model=1)}
    )
    before = planned(model, checkpointed)
    after = planned(model, checkpointed.model_copy(update={"activation_offloading": True}))
    one = WINDOWS * POSITIONS * SHAPE.text_width * 4
    assert sum(part.offloaded for part in after) == SHAPE.text_layers * one
    assert sum(part.kept for part in before) - sum(part.kept for part in after) == SHAPE.text_layers * one
    assert max(part.again for part in after) == max(part.again for part in before) + 2 * one


def test_chunks_of_the_encoder_keep_features_and_embeddings(models):
    model, config = model_of(models["base"], TrainableConfig(), encoder_windows_per_chunk=1)
    names = {part.name: part for part in planned(model, config)}
    chunks = names["encoder chunks"]
    features = 128 * 2 * SHAPE.num_positions * 4
    assert chunks.kept == WINDOWS * (features + SHAPE.num_audio_tokens * SHAPE.text_width * 4)
    whole = Activations(model, config).encoder(1)
    assert chunks.again == max(forward_peak(whole), backward_peak(whole))


def test_the_backward_pass_frees_while_gradients_come():
    parts = [Part("a", kept=10, num_trained=3), Part("b", kept=4, again=5, working=2, num_trained=7, passing=30)]
    assert forward_peak(parts) == 10 + 4 + 30
    assert backward_peak(parts) == 14 + 5 + 2
    assert backward_peak(parts, gradient_bytes=3) == 10 + 21
    # At the end all gradients are held.
    assert backward_peak(parts, gradient_bytes=4) == 28 + 12
