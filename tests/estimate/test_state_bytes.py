"""Bytes of a trained value's states by optimizer and engine."""

from __future__ import annotations

from typing import Any

import pytest

from voxtral_dist.config import ModelConfig, OptimizerConfig, TrainableConfig
from voxtral_dist.estimate.estimator import meta_model_of
from voxtral_dist.estimate.sharding import Fsdp2Sharding, ZeroSharding
from voxtral_dist.estimate.state_bytes import StateBytes, state_bytes

MINI = "mistralai/Voxtral-Mini-3B-2507"
EMBEDDING = 131_072 * 3072
# Of 4.68 x 10^9, those whose moments stay float32: the embedding, the encoder's first matrix, norms and biases.
FEW = {"algorithm": "adamw_8bit", "master_weights": False}


def bytes_of(optimizer: dict[str, Any], sharding: Any, trainable: dict[str, Any] | None = None) -> StateBytes:
    model = meta_model_of(ModelConfig(path=MINI), TrainableConfig.model_validate(trainable or {}))
    config = OptimizerConfig(learning_rate=1e-5, max_grad_norm=0.0).model_copy(update=optimizer)
    return state_bytes(model, config, sharding)


def test_states_of_mini() -> None:
    assert bytes_of({}, Fsdp2Sharding()) == StateBytes(4, 4, 8)
    assert bytes_of({"algorithm": "muon"}, ZeroSharding(3)) == StateBytes(4, 4, 4)
    assert bytes_of({"master_weights": False}, Fsdp2Sharding()) == StateBytes(2, 2, 8)
    few = bytes_of(FEW, Fsdp2Sharding())
    assert (few.weight, few.gradient) == (2, 2)
    num_values = 4.6763e9
    assert few.moments * num_values == pytest.approx(2.03125 * num_values + 5.97 * (EMBEDDING + 2e6), rel=2e-3)


def test_zero_keeps_float32_states() -> None:
    assert bytes_of(FEW, ZeroSharding(3)) == StateBytes(4, 4, 8)


def test_adapters_keep_float32_states() -> None:
    assert bytes_of(FEW, Fsdp2Sharding(), {"lora": {"rank": 8}}) == StateBytes(4, 4, 8)
