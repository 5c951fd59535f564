"""Training on the device: the numbers of the CPU, nothing on the wrong device, and no more waits than are listed here.

The list is the contract: a wait that comes back fails a test, which names the function that waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from voxtral_dist.config import RunConfig
from voxtral_dist.data.examples.micro_batch import MicroBatch, weightless_micro_batch
from voxtral_dist.data.loader import build_train_loader
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.engine import StepUpdate
from voxtral_dist.engine.loss import LossOfMicroBatch
from voxtral_dist.engine.optim import parameter_groups, set_learning_rate
from voxtral_dist.model.encoder import ChunkedEncoder
from voxtral_dist.model.features import LogMel, mask_features
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.model.voxtral import DTYPES, initialize_buffers, trained_meta_model
from voxtral_dist.model.weights import InitialWeights
from voxtral_dist.train import build_train_step

from fake_cuda import CUDA, CudaTensor, DeviceLog, fake_cuda, log, values
from runs import run_config

CPU = torch.device("cpu")
NUM_TENSORS = sum(field.type == "Tensor" for field in fields(MicroBatch))
# The inputs of two blocks leave, and that of the second is still there when the backward pass begins.
NUM_OFFLOADED_COPIES = 3
NUM_STEPS = 3
MOST_WAITS_OF_A_MICRO_BATCH = 2

# Waits of the host for the device by place: how often, and the reason for which they stay.
WAITS_OF_A_MICRO_BATCH: dict[str, tuple[int, str]] = {}
WAITS_OF_A_STEP = {
    "training.step.TrainStep.run: reads a value": (1, "the norm of the gradient, in the engine of this test"),
    "distributed.collectives.RankRows.read: reads values": (1, "loss and next step, which are there with the norm"),
}
# Numbers of the host that travel with the loss.
NUM_EXCHANGED_COPIES = 1


class PlainEngine:
    """The part of `Engine` that a step uses, without sharding: what is left of an engine on a single device."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.model = trained_meta_model(config.model, config.trainable, DTYPES[config.model.precision])
        initialize_buffers(self.model, device)
        InitialWeights(config.model.path, self.model, config.seed).fill(self.model, device)
        self._encoder = ChunkedEncoder(self.model, config.model.encoder_windows_per_chunk)
        self.loss = LossOfMicroBatch(LogMel.from_pretrained(config.model.path, device), config.model.loss_chunk_tokens)
        self._device = device
        self.trained = [one for one in self.model.parameters() if one.requires_grad]
        groups = parameter_groups(self.model, config.optimizer)
        self.optimizer = torch.optim.AdamW(groups, eps=config.optimizer.epsilon, fused=True)

    def backward(self, batch: MicroBatch, num_target_tokens: int, *, is_last: bool) -> Tensor:
        self._encoder.num_chunks = batch.num_encoder_chunks
        loss_sum = self.loss(self.model, batch.to(self._device))
        (loss_sum / num_target_tokens).backward()  # type: ignore[no-untyped-call]
        return loss_sum.detach()

    def step(self, learning_rate: float, accepts: Callable[[float], bool]) -> StepUpdate:
        norm = float(nn.utils.clip_grad_norm_(self.trained, 1.0))
        assert accepts(norm)
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepUpdate(norm, learning_rate)


@dataclass
class Trained:
    """Some steps: (loss, gradient norm) of each, the weights after them, and what the device saw of the last one."""

    curve: list[tuple[float, float | None]]
    weights: dict[str, Tensor]
    engine: PlainEngine
    last_step: DeviceLog
    num_micro_batches: int


def train(config: RunConfig, device: torch.device, world_size: int = 1) -> Trained:
    """Some steps of a rank; each ends with a micro-batch without targets, as on a rank with a slot less than others."""
    prompts = VoxtralPrompts.from_pretrained(config.model.path)
    world = World(0, world_size, 0, device)
    loader = build_train_loader(
        config.train_data, prompts, config.seed, NUM_STEPS, 0, 1, pin_memory=device.type == "cuda"
    )
    engine: Any = PlainEngine(config, device)
    step = build_train_step(config, engine, world, log_mel=LogMel.from_pretrained(config.model.path, device))
    curve, last_step, num_micro_batches = [], DeviceLog(), 0
    weightless = weightless_micro_batch(prompts)
    weightless = weightless.pin_memory() if device.type == "cuda" else weightless
    steps = [replace(one, micro_batches=[*one.micro_batches, weightless]) for one in loader.starting_at(0)]
    for batches, upcoming in zip_longest(steps, steps[1:]):
        batches = replace(batches, upcoming=upcoming)
        log.take()
        metrics = step.run(batches).metrics
        last_step, num_micro_batches = log.take(), len(batches.micro_batches)
        curve.append((metrics.loss, metrics.grad_norm))
    weights = {name: values(one.detach()).clone() for name, one in engine.model.named_parameters()}
    return Trained(curve, weights, engine, last_step, num_micro_batches)


TRAINABLES: dict[str, dict[str, Any]] = {
    "all weights": {},
    "LoRA": {"lora": {"rank": 4}},
    "DoRA, trained encoder, frozen projector": {
        "lora": {"rank": 4, "use_dora": True, "trained_whole": ["encoder"]},
        "frozen": ["projector"],
    },
}


def config_of(folder: Path, model: Path, shards: Path, precision: str, trainable: Mapping[str, Any]) -> RunConfig:
    """Everything at once that a micro-batch can have: masks, chunks of each kind, checkpoints, offloading."""
    config = run_config(folder, model, shards, num_steps=NUM_STEPS, slots_per_step=3)
    tree = config.model_dump()
    tree["model"] |= {
        "precision": precision,
        "activation_checkpointing": {"encoder": 1, "language_model": 1},
        "activation_offloading": True,
        "mlp_chunk_tokens": 30,
        "encoder_windows_per_chunk": 2,
        "loss_chunk_tokens": 5,
    }
    tree["train_data"] |= {"spec_augment": {}, "num_workers": 1}
    return RunConfig.model_validate(tree | {"trainable": trainable})


# Each precision and each choice of weights is in a fast one.
SLOW = {("float32", "all weights"), ("float32", "LoRA"), ("bfloat16", "DoRA, trained encoder, frozen projector")}
CASES = [
    pytest.param(precision, name, marks=[pytest.mark.slow] if (precision, name) in SLOW else [])
    for precision in ("float32", "bfloat16")
    for name in TRAINABLES
]


def assert_on_device(engine: PlainEngine) -> None:
    named = [*engine.model.named_parameters(), *engine.model.named_buffers()]
    states = [(key, one) for state in engine.optimizer.state.values() for key, one in state.items()]
    strays = [name for name, one in [*named, *states] if not isinstance(one.data, CudaTensor)]
    assert not strays


def assert_allowed(
    waits: Mapping[str, int], num_micro_batches: int, waits_of_a_step: Mapping[str, tuple[int, str]] = WAITS_OF_A_STEP
) -> None:
    """Every wait is listed, and happens as often as listed: a list that allows more proves nothing."""
    allowed = Counter({place: count for place, (count, _) in waits_of_a_step.items()})
    for place, (count, _) in WAITS_OF_A_MICRO_BATCH.items():
        allowed[place] += count * num_micro_batches
    others = {
        place: f"{waits.get(place, 0)} times, not {allowed[place]}"
        for place in waits.keys() | allowed.keys()
        if waits.get(place, 0) != allowed[place]
    }
    assert not others, f"the host waits for the device: {others}"


def test_few_waits_are_listed() -> None:
    assert sum(count for count, _ in WAITS_OF_A_MICRO_BATCH.values()) <= MOST_WAITS_OF_A_MICRO_BATCH


@pytest.mark.parametrize(("precision", "trainable"), CASES)
def test_steps_equal_those_on_the_cpu_and_wait_for_nothing_that_is_not_listed(
    tmp_path: Path, tiny_model: Path, shard_folder: Path, precision: str, trainable: str
) -> None:
    config = config_of(tmp_path, tiny_model, shard_folder, precision, TRAINABLES[trainable])
    expected = train(config, CPU)
    with fake_cuda():
        actual = train(config, CUDA)
    is_exact = config.model.precision == "float32"
    # The device transforms all audio of a micro-batch at once, the CPU a clip at a time, which rounds differently.
    np.testing.assert_allclose(np.array(actual.curve), np.array(expected.curve), rtol=2e-5 if is_exact else 2e-2)
    for name, weight in expected.weights.items():
        difference = float((actual.weights[name] - weight).abs().max())
        assert difference < (1e-5 if is_exact else 2e-2), name
    assert_on_device(actual.engine)
    assert_allowed(actual.last_step.waits, actual.num_micro_batches)
    num_copies = (NUM_TENSORS + NUM_OFFLOADED_COPIES) * actual.num_micro_batches + NUM_EXCHANGED_COPIES
    assert actual.last_step.num_copies == num_copies
    assert actual.last_step.operations["aten._fused_adamw_.default"] > 0
    # Copied tensors and features, which were made on another stream than the one that computes.
    assert actual.last_step.num_recorded == (NUM_TENSORS + 1) * actual.num_micro_batches


@pytest.fixture
def plain_config(tmp_path: Path, tiny_model: Path, shard_folder: Path) -> RunConfig:
    return config_of(tmp_path, tiny_model, shard_folder, "float32", {})


def test_an_exchange_with_other_ranks_is_one_operation_and_no_wait_of_its_own(
    plain_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchanged: list[Tensor] = []
    # The other rank has nothing.
    monkeypatch.setattr("torch.distributed.all_reduce", exchanged.append)
    with fake_cuda():
        trained = train(plain_config, CUDA, world_size=2)
    assert_allowed(trained.last_step.waits, trained.num_micro_batches)
    assert len(exchanged) == 1 + NUM_STEPS, "the first step is told of before it begins"


def test_one_more_wait_fails(plain_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def mask_some(features: Tensor, feature_masks: Tensor) -> Tensor:
        return mask_features(features, feature_masks) if features.isfinite().all() else features

    monkeypatch.setattr("voxtral_dist.training.ahead.mask_features", mask_some)
    with fake_cuda():
        trained = train(plain_config, CUDA)
    with pytest.raises(AssertionError, match=r"training\.ahead\.MicroBatchesAhead\._begin: reads a value"):
        assert_allowed(trained.last_step.waits, trained.num_micro_batches)


@pytest.mark.parametrize("name", ["input_ids", "audio_places", "target_ids", "pcm", "feature_masks"])
def test_a_tensor_that_is_left_on_the_cpu_is_refused(plain_config: RunConfig, name: str) -> None:
    prompts = VoxtralPrompts.from_pretrained(plain_config.model.path)
    loader = build_train_loader(plain_config.train_data, prompts, plain_config.seed, 1, 0, 1)
    batch = next(loader.starting_at(0)).micro_batches[0]
    with fake_cuda():
        engine = PlainEngine(plain_config, CUDA)
        mixed = replace(batch.to(CUDA), **{name: getattr(batch, name)})
        with pytest.raises(RuntimeError, match="same device"):
            engine.loss(engine.model, mixed)
