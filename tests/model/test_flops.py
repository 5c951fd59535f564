"""The formulas give what torch counts while it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from voxtral_dist.config import ModelConfig, TrainableConfig
from voxtral_dist.data.examples.micro_batch import MicroBatch
from voxtral_dist.data.loader import build_train_loader
from voxtral_dist.engine.loss import LossOfMicroBatch
from voxtral_dist.model.encoder import ChunkedEncoder
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.flops import BatchShape, TrainingFlops
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.model.voxtral import TrainedVoxtral, trained_meta_model
from voxtral_dist.model.weights import load_voxtral

from runs import run_config

ALL: dict[str, Any] = {}
ENCODER_FROZEN = {"frozen": ["encoder"]}
AUDIO_FROZEN = {"frozen": ["encoder", "projector"]}
BLOCK_FROZEN = {"frozen": ["model.audio_tower.conv*", "model.audio_tower.layers.0.*"]}
NORMS = {"frozen": ["encoder", "projector", "*_proj*", "*embed_tokens*", "lm_head*"]}
LOGITS = {"frozen": ["encoder", "projector", "model.language_model*"]}
LORA = {"lora": {"rank": 3}}
LORA_QUERIES = {"lora": {"rank": 3, "targets": {"language_model": ["q_proj"]}}}
LORA_VALUES = {"lora": {"rank": 3, "targets": {"language_model": ["v_proj"]}}}
LORA_ENCODER = {"lora": {"rank": 3, "targets": {"encoder": ["k_proj", "fc2"]}}}
LORA_LAST = {"lora": {"rank": 3, "targets": {"encoder": ["k_proj"], "projector": ["linear_2"]}}}
LORA_AND_PROJECTOR = {"lora": {"rank": 3, "trained_whole": ["projector"]}}
NAMED = {name.lower(): value for name, value in list(globals().items()) if name.isupper()}
NO_CHECKPOINTS = {"encoder": 0, "language_model": 0}
EVERY_BLOCK = {"encoder": 1, "language_model": 1}
EVERY_OTHER = {"encoder": 2, "language_model": 2}


def model_config(tiny_model: Path, checkpointing: dict[str, int]) -> ModelConfig:
    # Eager attention is made of products that torch counts; its other kernels on CPUs are not counted.
    return ModelConfig.model_validate(
        {
            "path": str(tiny_model),
            "precision": "float32",
            "attention": "eager",
            "activation_checkpointing": checkpointing,
            "loss_chunk_tokens": 3,
        }
    )


def micro_batch(tiny_model: Path, shard_folder: Path, tmp_path: Path) -> MicroBatch:
    """Two examples of different lengths, which have several windows together."""
    data = run_config(tmp_path / "run", tiny_model, shard_folder, num_steps=4).train_data
    loader = build_train_loader(data, VoxtralPrompts.from_pretrained(str(tiny_model)), 0, 4, 0, 1)
    batches = [batch for step in loader.starting_at(0) for batch in step.micro_batches]
    return next(one for one in batches if len(set(one.windows_per_example)) == 2)


def counted_by_torch(model: TrainedVoxtral, batch: MicroBatch, log_mel: LogMel) -> tuple[int, int]:
    """FLOPs of the model's products in the forward pass, and in the forward and backward pass."""
    with FlopCounterMode(display=False) as both:
        with FlopCounterMode(display=False) as forward:
            loss = LossOfMicroBatch(log_mel, 3)(model, batch)
        loss.backward()
    with FlopCounterMode(display=False) as others:
        # Neither has weights: the bank of mel filters, and the angles of rotary embeddings.
        log_mel(batch.pcm, batch.windows_per_example)
        model.model.language_model.rotary_emb(torch.zeros(1), torch.arange(batch.input_ids.shape[1])[None])
    rest = others.get_total_flops()
    return forward.get_total_flops() - rest, both.get_total_flops() - rest


def shape_of(batch: MicroBatch, num_encoder_chunks: int = 1) -> BatchShape:
    return BatchShape.computed(batch.num_windows, *batch.input_ids.shape, batch.num_target_tokens, num_encoder_chunks)


@pytest.fixture(scope="module")
def batch(tiny_model: Path, shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> MicroBatch:
    return micro_batch(tiny_model, shard_folder, tmp_path_factory.mktemp("flops"))


CASES = [
    *((name, NO_CHECKPOINTS) for name in NAMED),
    *((name, EVERY_BLOCK) for name in ("all", "encoder_frozen", "lora", "lora_encoder")),
    *((name, EVERY_OTHER) for name in ("all", "block_frozen")),
]


@pytest.mark.parametrize(("trainable", "checkpointing"), CASES)
def test_formulas_give_what_torch_counts(
    tiny_model: Path, batch: MicroBatch, trainable: str, checkpointing: dict[str, int]
) -> None:
    config = model_config(tiny_model, checkpointing)
    model = load_voxtral(config, TrainableConfig.model_validate(NAMED[trainable]))
    flops = TrainingFlops(model, config)
    forward, both = counted_by_torch(model, batch, LogMel.from_pretrained(str(tiny_model), torch.device("cpu")))
    assert sum(flops.forward(shape_of(batch)).values()) == forward
    assert flops.hardware(shape_of(batch)) == both


@pytest.mark.parametrize(
    ("trainable", "checkpointing", "num_encoder_chunks"),
    [
        ("all", NO_CHECKPOINTS, 2),
        ("all", EVERY_OTHER, 2),
        # More chunks than windows: the rest take silence.
        ("all", NO_CHECKPOINTS, 9),
        ("encoder_frozen", NO_CHECKPOINTS, 2),
        ("audio_frozen", NO_CHECKPOINTS, 2),
        ("lora_last", EVERY_BLOCK, 2),
    ],
)
def test_recomputed_chunks_of_the_encoder_are_counted(
    tiny_model: Path, batch: MicroBatch, trainable: str, checkpointing: dict[str, int], num_encoder_chunks: int
) -> None:
    config = model_config(tiny_model, checkpointing)
    model = load_voxtral(config, TrainableConfig.model_validate(NAMED[trainable]))
    ChunkedEncoder(model, windows_per_chunk=1).num_chunks = num_encoder_chunks
    _, both = counted_by_torch(model, batch, LogMel.from_pretrained(str(tiny_model), torch.device("cpu")))
    assert TrainingFlops(model, config).hardware(shape_of(batch, num_encoder_chunks)) == both


@pytest.mark.parametrize(
    ("trainable", "checkpointing"),
    [
        ("all", NO_CHECKPOINTS),
        ("all", EVERY_BLOCK),
        ("encoder_frozen", EVERY_OTHER),
        ("block_frozen", NO_CHECKPOINTS),
        ("lora", EVERY_OTHER),
        ("lora_last", NO_CHECKPOINTS),
    ],
)
def test_recomputed_chunks_of_mlps_are_counted_and_cost_nothing_in_checkpointed_blocks(
    tiny_model: Path, batch: MicroBatch, trainable: str, checkpointing: dict[str, int]
) -> None:
    plain = model_config(tiny_model, checkpointing)
    config = plain.model_copy(update={"mlp_chunk_tokens": 13})
    chosen = TrainableConfig.model_validate(NAMED[trainable])
    model = load_voxtral(config, chosen)
    forward, both = counted_by_torch(model, batch, LogMel.from_pretrained(str(tiny_model), torch.device("cpu")))
    flops = TrainingFlops(model, config)
    assert sum(flops.forward(shape_of(batch)).values()) == forward
    assert flops.hardware(shape_of(batch)) == both
    is_equal = both == TrainingFlops(load_voxtral(plain, chosen), plain).hardware(shape_of(batch))
    assert is_equal == (checkpointing == EVERY_BLOCK)


def test_a_model_without_weights_is_counted_alike(tiny_model: Path, batch: MicroBatch) -> None:
    config = model_config(tiny_model, EVERY_OTHER)
    trainable = TrainableConfig.model_validate(LORA)
    on_meta = TrainingFlops(trained_meta_model(config, trainable, torch.bfloat16), config)
    loaded = TrainingFlops(load_voxtral(config, trainable), config)
    assert on_meta.hardware(shape_of(batch)) == loaded.hardware(shape_of(batch))


def test_training_all_weights_costs_three_forward_passes(tiny_model: Path) -> None:
    config = model_config(tiny_model, EVERY_BLOCK)
    model = load_voxtral(config)
    flops = TrainingFlops(model, config)
    shape = BatchShape.needed(3, [40, 30], 9)
    # No gradient reaches the audio, which the first convolution takes.
    first = model.model.audio_tower.conv1
    frames = 2 * model.config.audio_config.max_source_positions
    spared = 3 * 2 * frames * first.weight.numel()
    assert flops.model(shape) == 3 * sum(flops.forward(shape).values()) - spared


def test_model_flops_know_neither_padding_nor_checkpoints_nor_micro_batches(tiny_model: Path) -> None:
    lengths = [40, 30, 12]
    plain = TrainingFlops(load_voxtral(model_config(tiny_model, NO_CHECKPOINTS)), model_config(tiny_model, {}))
    again = TrainingFlops(load_voxtral(model_config(tiny_model, EVERY_BLOCK)), model_config(tiny_model, EVERY_BLOCK))
    together = BatchShape.needed(3, lengths, 9)
    apart = BatchShape.needed(1, lengths[:1], 2) + BatchShape.needed(2, lengths[1:], 7)
    assert apart == together
    assert plain.model(together) == again.model(together)
    padded = BatchShape.computed(3, 3, 40, 9)
    # torch keeps no logits, without any checkpoint that is configured too.
    logits_again = plain.forward(BatchShape(num_target_tokens=9))["language_model"]
    assert plain.hardware(padded) - logits_again == plain.model(padded) > plain.model(together)
    assert again.hardware(padded) > plain.hardware(padded)


def test_causal_attention_counts_the_half_that_is_needed(tiny_model: Path) -> None:
    shape = BatchShape.needed(0, [4, 3], 0)
    pairs = sum(1 for length in (4, 3) for place in range(length) for seen in range(length) if seen <= place)
    assert (shape.num_positions, shape.num_pairs) == (7, pairs)
    config = model_config(tiny_model, NO_CHECKPOINTS)
    flops = TrainingFlops(load_voxtral(config), config)
    one_more = BatchShape(num_pairs=1)
    text = load_voxtral(config).config.text_config
    per_pair = 2 * 2 * text.num_attention_heads * text.head_dim * text.num_hidden_layers
    assert flops.forward(one_more)["language_model"] == per_pair
