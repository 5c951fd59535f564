"""Adapters beside quantized weights train like adapters beside the weights that these are rounded to (QLoRA)."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from voxtral_dist.checkpoints.loading import checkpoint_weights
from voxtral_dist.config import RunConfig
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.build import check_engine
from voxtral_dist.errors import UserError
from voxtral_dist.model import nf4
from voxtral_dist.model.quantized_linear import QuantizedLinear
from voxtral_dist.model.trainable import count_parameters
from voxtral_dist.model.voxtral import trained_meta_model
from voxtral_dist.model.weights import InitialWeights, load_voxtral

import test_checkpoint
from ranks import run_ranks
from runs import run_config
from test_equations import (
    CHECKPOINTED,
    NUM_STEPS,
    Curve,
    Weights,
    assert_same,
    logits_in_decoding,
    train_plainly,
    train_sharded,
)

pytest.importorskip("bitsandbytes")
LORA = {"rank": 4, "targets": {"language_model": ["q_proj", "down_proj"], "encoder": ["fc1"]}}
QUANTIZED = ["encoder", "language_model"]

# Numbers of ranks, and settings of section `engine` and of section `model`.
VARIANTS: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
    (1, {"fsdp2": {}}, CHECKPOINTED | {"mlp_chunk_tokens": 40}),
    (2, {"fsdp2": {}}, {"encoder_windows_per_chunk": 2}),
    (2, {"stage": 2}, CHECKPOINTED),
    (3, {"fsdp2": {"cpu_offload": True}}, CHECKPOINTED),
]


@pytest.fixture(scope="module")
def config(tiny_model: Path, shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("run")
    return run_config(folder, tiny_model, shard_folder, num_steps=NUM_STEPS, slots_per_step=5, stage=2)


def changed(config: RunConfig, **sections: Any) -> RunConfig:
    tree = config.model_dump()
    tree["model"] |= sections.pop("model", {})
    return RunConfig.model_validate(tree | sections)


def quantized(config: RunConfig, engine: dict[str, Any], model: dict[str, Any]) -> RunConfig:
    chosen = {"engine": engine} if "fsdp2" in engine else {}
    return changed(config, trainable={"lora": LORA | {"quantized": QUANTIZED}}, model=model, **chosen)


def store_exactly() -> None:
    """Let this process keep float32 values as bytes instead of quantizing them."""
    nf4.bytes_of_row = lambda num_columns: 4 * num_columns  # type: ignore[assignment]
    nf4.quantized = lambda values: values.float().contiguous().view(torch.uint8)  # type: ignore[assignment]
    nf4.dequantized = lambda packed, num_columns, dtype: packed.view(torch.float32).to(dtype)  # type: ignore[assignment]


def train_exactly_and_quantized(
    world: World, configs: list[RunConfig]
) -> list[tuple[tuple[Curve, Weights], tuple[Curve, Weights]]]:
    """Each run with rounded weights, then with weights that are packed without rounding."""
    rounded = [train_sharded(world, config) for config in configs]
    gc.collect()
    store_exactly()
    return list(zip(rounded, [train_sharded(world, config) for config in configs], strict=True))


def plain_adapters(config: RunConfig, is_rounded: bool) -> tuple[Curve, Weights]:
    """LoRA in one process, beside the initial weights or beside what they are rounded to."""
    lora = changed(config, trainable={"lora": LORA})
    model = load_voxtral(lora.model, lora.trainable, lora.seed)
    places = quantized(config, {}, {}).trainable
    names = [
        name
        for name, one in trained_meta_model(lora.model, places, torch.float32).named_modules()
        if isinstance(one, QuantizedLinear)
    ]
    assert len(names) == 2 * (4 + 2) + 2 * (4 + 3), "all matrices of two blocks of each component"
    if is_rounded:
        for name in names:
            layer: Any = model.get_submodule(name)
            packed = nf4.quantized(layer.weight.detach())
            layer.weight.data = nf4.dequantized(packed, layer.in_features, torch.float32)
    return train_plainly(lora, model)


def trained_part(run: tuple[Curve, Weights]) -> tuple[Curve, Weights]:
    """The curve, and the weights of adapters."""
    return run[0], {name: one for name, one in run[1].items() if ".lora_" in name}


@pytest.mark.parametrize(
    "world_size", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_quantized_training_equals_that_beside_rounded_weights_and_without_rounding_plain_adapters(
    config: RunConfig, world_size: int
) -> None:
    runs = [quantized(config, engine, model) for count, engine, model in VARIANTS if count == world_size]
    rounded, exact = plain_adapters(config, is_rounded=True), plain_adapters(config, is_rounded=False)
    assert abs(rounded[0][-1][0] - exact[0][-1][0]) > 1e-4, "rounding changes nothing"
    for of_rank in run_ranks(world_size, train_exactly_and_quantized, runs):
        for with_nf4, without in of_rank:
            assert_same(trained_part(with_nf4), trained_part(rounded))
            # What is exported is the weights of `model.path`, whatever they were rounded to.
            assert_same((exact[0], with_nf4[1] | trained_part(exact)[1]), exact)
            assert_same(without, exact)


def test_decoding_takes_the_quantized_weights(config: RunConfig) -> None:
    run = quantized(config, {"fsdp2": {}}, {})
    for found, expected in run_ranks(2, logits_in_decoding, run):
        torch.testing.assert_close(found, expected)


def test_the_table_counts_values_and_not_bytes(config: RunConfig) -> None:
    counts = [
        count_parameters(trained_meta_model(config.model, one.trainable, torch.float32))
        for one in (quantized(config, {}, {}), changed(config, trainable={"lora": LORA}))
    ]
    assert counts[0] == counts[1]


def test_a_matrix_is_read_and_quantized_alone(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run = quantized(config, {}, {})
    model = trained_meta_model(run.model, run.trainable, torch.float32)
    initial = InitialWeights(run.model.path, model, run.seed)
    sizes = []
    pack = nf4.quantized
    monkeypatch.setattr(nf4, "quantized", lambda values: sizes.append(tuple(values.shape)) or pack(values))
    name = "model.language_model.layers.1.mlp.down_proj.base_layer.weight"
    assert initial.rows(name, 3, 5).shape == (2, nf4.bytes_of_row(128))
    assert sizes == [(2, 128)]


def test_exports_of_a_checkpoint_take_the_unquantized_weights(config: RunConfig, tmp_path: Path) -> None:
    run = quantized(config, {}, {}).model_copy(update={"run_dir": tmp_path, "num_steps": 3})
    run_ranks(1, test_checkpoint.train_to, run, 1)
    stored = load_voxtral(run.model)
    name = "model.language_model.layers.1.mlp.down_proj.base_layer.weight"
    found = dict(checkpoint_weights(str(tmp_path / "checkpoints" / "step-0000001")))
    assert torch.equal(found[name], stored.get_parameter(name.replace(".base_layer", "")))


def test_zero_3_is_refused(config: RunConfig) -> None:
    run = quantized(config, {}, {})
    third = config.engine.deepspeed.with_name("zero3.json")
    refused = changed(run, engine={"deepspeed": third})
    with pytest.raises(UserError, match=r"`trainable\.lora\.quantized` does not work with ZeRO-3"):
        check_engine(refused)
    check_engine(run)
