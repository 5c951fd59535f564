"""The estimate of memory agrees with what torch's MemTracker counts at the published shape.

Fast tests keep all widths of Voxtral-Mini-3B and a few of its blocks; slow ones train the whole model. Each case is a
forward and a backward pass on fake tensors, of clips of 30 s with 60 target tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import VoxtralConfig

from voxtral_dist.config import Fsdp2Config, LoraConfig, ModelConfig, OptimizerConfig, TrainableConfig
from voxtral_dist.estimate.activations import Activations, MicroBatchShape
from voxtral_dist.estimate.estimator import estimate_memory, meta_model_of
from voxtral_dist.estimate.parts import backward_peak, forward_peak
from voxtral_dist.estimate.phases import MemoryEstimate, ModelSizes, Setting
from voxtral_dist.estimate.sharding import Fsdp2Sharding
from voxtral_dist.model.published import MINI, published_config
from voxtral_dist.model.voxtral import DTYPES

from tracked_memory import TrackedBytes, fsdp2_bytes, plain_bytes

POSITIONS, TARGETS = 445, 60
TOLERANCE = 0.05
OPTIMIZER = OptimizerConfig(learning_rate=1e-5)
TRAINABLES = {
    "full": TrainableConfig(),
    "LoRA": TrainableConfig(lora=LoraConfig()),
    "frozen encoder": TrainableConfig(frozen=("encoder",)),
}


@dataclass(frozen=True)
class Case:
    """What is trained, how, and the examples of a micro-batch."""

    trainable: str = "full"
    num_examples: int = 8
    checkpoints: bool = False
    precision: str = "bfloat16"
    attention: str = "sdpa"
    windows_per_example: int = 1
    windows_per_chunk: int = 16
    float8: str | None = None

    @property
    def shape(self) -> MicroBatchShape:
        windows = self.num_examples * self.windows_per_example
        positions = POSITIONS + 375 * (self.windows_per_example - 1)
        return MicroBatchShape(windows, self.num_examples, positions, self.num_examples * TARGETS)

    def config(self, model: Path) -> ModelConfig:
        every = int(self.checkpoints)
        return ModelConfig(
            path=str(model),
            precision=self.precision,
            attention=self.attention,
            activation_checkpointing={"encoder": every, "language_model": every},
            encoder_windows_per_chunk=self.windows_per_chunk,
            float8=self.float8,
            compile_blocks=False,
        )


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run under FSDP2, and its settings."""

    num_ranks: int = 8
    num_micro_batches: int = 1
    reshards: bool = True
    reduce_bytes: int = 4
    ranks_per_replica: int | None = None

    @property
    def settings(self) -> Fsdp2Config:
        precision: Any = "float32" if self.reduce_bytes == 4 else "bfloat16"
        return Fsdp2Config(
            reshard_after_forward=self.reshards,
            reduce_precision=precision,
            ranks_per_replica=self.ranks_per_replica,
        )

    @property
    def sharding(self) -> Fsdp2Sharding:
        return Fsdp2Sharding(self.reshards, self.ranks_per_replica, self.reduce_bytes)


@pytest.fixture(scope="module")
def few_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The description of Voxtral-Mini-3B with two blocks in each component."""
    config = published_config(MINI)
    config.audio_config.num_hidden_layers = config.text_config.num_hidden_layers = 2
    return write_config(config, tmp_path_factory.mktemp("few-blocks"))


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(published_config(MINI), tmp_path_factory.mktemp("mini"))


def write_config(config: VoxtralConfig, folder: Path) -> Path:
    config.save_pretrained(folder)
    return folder


def assert_plain_agrees(case: Case, model: Path) -> None:
    """Compare weights, and the peak of activations and gradients in the model's precision."""
    config, trainable = case.config(model), TRAINABLES[case.trainable]
    tracked = plain_bytes(config, trainable, case.shape)
    meta = meta_model_of(config, trainable)
    parts, sizes = Activations(meta, config).parts(case.shape), ModelSizes.of(meta, OPTIMIZER)
    value_bytes = DTYPES[case.precision].itemsize
    weights = sizes.all * value_bytes
    assert tracked.before == pytest.approx(weights, rel=0.01)
    assert tracked.after == pytest.approx(weights + sizes.trained * value_bytes, rel=0.01)
    estimated = weights + max(forward_peak(parts), backward_peak(parts, value_bytes))
    report(case, tracked, estimated)
    assert estimated == pytest.approx(tracked.peak, rel=TOLERANCE)


def assert_fsdp2_agrees(case: Case, ranks: Ranks, model: Path) -> None:
    """Compare states, and the peak of all micro-batches of a step."""
    config, trainable = case.config(model), TRAINABLES[case.trainable]
    tracked = fsdp2_bytes(config, trainable, case.shape, ranks.num_ranks, ranks.num_micro_batches, ranks.settings)
    estimate = estimated_memory(case, ranks, model)
    phases = {phase.name: phase for phase in estimate.phases}
    states = phases["update"].device
    assert tracked.before == pytest.approx(states["weights"] + states["optimizer"], rel=0.01)
    assert tracked.after == pytest.approx(states["weights"] + states["optimizer"] + states["gradients"], rel=0.01)
    estimated = max(phases[name].device_bytes for name in ("forward pass", "backward pass")) - states["libraries"]
    report((case, ranks), tracked, estimated)
    assert estimated == pytest.approx(tracked.peak, rel=TOLERANCE)


def estimated_memory(case: Case, ranks: Ranks, model: Path) -> MemoryEstimate:
    config, trainable = case.config(model), TRAINABLES[case.trainable]
    meta = meta_model_of(config, trainable)
    setting = Setting("gpu", ranks.num_ranks, ranks.num_micro_batches, DTYPES[case.precision].itemsize)
    parts = Activations(meta, config).parts(case.shape)
    return estimate_memory(ranks.sharding, ModelSizes.of(meta, OPTIMIZER), parts, setting)


def report(case: object, tracked: TrackedBytes, estimated: float) -> None:
    """Print a row, which pytest shows with `-rP`."""
    print(f"{case}: tracked {tracked.peak / 1e9:.2f} GB, estimated {estimated / 1e9:.2f} GB")


PLAIN = {
    "full": Case(),
    "one example": Case(num_examples=1),
    "LoRA": Case("LoRA"),
    "frozen encoder": Case("frozen encoder"),
    "checkpoints": Case(checkpoints=True),
    "chunks of the encoder": Case(num_examples=2, windows_per_example=3, windows_per_chunk=4),
    "float32": Case(precision="float32"),
    "eager attention": Case(attention="eager"),
    "float8": Case(num_examples=32, checkpoints=True, float8="rowwise"),
    "emulated float8": Case(num_examples=32, checkpoints=True, float8="rowwise_emulated"),
}


# FSDP2 runs the same passes.
@pytest.mark.slow
@pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN)
def test_plain_training_of_some_blocks(case: Case, few_blocks: Path) -> None:
    if case.float8:
        pytest.importorskip("torchao")
    assert_plain_agrees(case, few_blocks)


SHARDED = {
    "full": (Case(), Ranks()),
    "several micro-batches": (Case(), Ranks(num_micro_batches=2)),
    "checkpoints": (Case(checkpoints=True), Ranks(2)),
    "chunks of the encoder": (Case(num_examples=2, windows_per_example=3, windows_per_chunk=4), Ranks()),
    "weights kept": (Case(), Ranks(reshards=False)),
    "replicas": (Case(num_examples=1), Ranks(8, ranks_per_replica=4)),
}


MORE_SHARDED = {
    "one rank": (Case(num_examples=1), Ranks(1)),
    "LoRA": (Case("LoRA"), Ranks()),
    "reduced in bfloat16": (Case(num_examples=1), Ranks(2, reduce_bytes=2)),
}


@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        *(pytest.param(*one, id=name) for name, one in SHARDED.items()),
        *(pytest.param(*one, id=name, marks=pytest.mark.slow) for name, one in MORE_SHARDED.items()),
    ],
)
def test_fsdp2_of_some_blocks(case: Case, ranks: Ranks, few_blocks: Path) -> None:
    assert_fsdp2_agrees(case, ranks, few_blocks)


WHOLE = [
    Case(trainable, num_examples, checkpoints)
    for trainable in ("full", "LoRA")
    for num_examples in (1, 8, 16)
    for checkpoints in (False, True)
]


@pytest.mark.slow
@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_plain_training_of_the_published_model(case: Case, mini: Path) -> None:
    assert_plain_agrees(case, mini)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [Ranks(1), Ranks(8), Ranks(8, num_micro_batches=2)], ids=str)
@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_fsdp2_of_the_published_model(case: Case, ranks: Ranks, mini: Path) -> None:
    assert_fsdp2_agrees(case, ranks, mini)
