"""The formula of `DecodingMemory` against what a real decoding allocates on a CPU in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from voxtral_dist.config import EvaluationConfig, ModelConfig
from voxtral_dist.data.examples.example import Example
from voxtral_dist.distributed.world import World
from voxtral_dist.evaluation.batch_decoder import BatchDecoder, load_decoder
from voxtral_dist.evaluation.decoding_memory import DecodingMemory, DecodingShape
from voxtral_dist.model.encoder import ChunkedEncoder
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.model.tiny import TinyShape, build_tiny_voxtral
from voxtral_dist.model.voxtral import read_voxtral_config

# Widths in about the proportions of Voxtral-Mini-3B.
SHAPE = TinyShape(
    window_seconds=5.12,
    vocab_size=8192,
    encoder_width=160,
    encoder_layers=2,
    encoder_heads=5,
    text_width=192,
    text_layers=4,
    text_heads=8,
    text_kv_heads=2,
    text_ffn_width=512,
)
# Samples of int16.
WINDOW_BYTES = 2 * round(16_000 * SHAPE.window_seconds)


@dataclass(frozen=True)
class Batch:
    """What is decoded, and the phase that should take most."""

    largest: str
    num_examples: int
    windows_each: int = 1
    num_targets: int = 20
    tokens_per_second: float = 1.0
    num_beams: int = 1
    windows_per_chunk: int = 16
    measures_loss: bool = False


BATCHES = [
    Batch("loss", 8, num_targets=200, measures_loss=True),
    Batch("loss", 3, windows_each=3, num_targets=700, measures_loss=True),
    Batch("encoder", 8),
    Batch("encoder", 4, windows_each=8),
    Batch("prompt", 4, windows_each=8, windows_per_chunk=1),
    Batch("prompt", 4, num_beams=4),
    # Profiles of many tokens take minutes, and gigabytes.
    pytest.param(Batch("last token", 8, tokens_per_second=300.0), marks=pytest.mark.slow),
    pytest.param(Batch("last token", 4, tokens_per_second=80.0, num_beams=4), marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "proportions"
    build_tiny_voxtral(folder, SHAPE)
    return folder


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory that torch's tensors hold while something runs, beyond what they held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(changes).max())


def examples_of(batch: Batch, prompts: VoxtralPrompts) -> list[Example]:
    """Noise of full windows."""
    num_samples = batch.windows_each * prompts.window_samples
    return [
        Example(
            utterance_id=number,
            key="",
            pcm=np.random.default_rng(number).normal(0, 3000, num_samples).astype(np.int16),
            num_windows=batch.windows_each,
            prompt=prompts.transcription("en", batch.windows_each),
            completion=(*[100] * (batch.num_targets - 1), prompts.eos_id),
            reference="",
            duration_seconds=batch.windows_each * prompts.window_seconds,
        )
        for number in range(batch.num_examples)
    ]


def measured_and_planned(
    model: Path, batch: Batch, settings: EvaluationConfig
) -> tuple[int, DecodingMemory, DecodingShape]:
    """Bytes that decoding a batch takes, and what they are planned by."""
    prompts = VoxtralPrompts.from_pretrained(str(model))
    decoder = load_decoder(str(model), prompts, settings, "float32", World(0, 1, 0, torch.device("cpu")))
    ChunkedEncoder.of(decoder._model).windows_per_chunk = batch.windows_per_chunk
    with torch.no_grad():
        # No hypothesis ends before its limit.
        decoder._model.lm_head.weight[prompts.eos_id] = 0.0
    examples = examples_of(batch, prompts)
    measured = peak_bytes(lambda: decoder.decode(examples, with_loss=batch.measures_loss))
    config = ModelConfig(path=str(model), precision="float32", encoder_windows_per_chunk=batch.windows_per_chunk)
    memory = DecodingMemory(read_voxtral_config(str(model)), config, settings, "cpu")
    shape = DecodingShape(
        num_examples=batch.num_examples,
        num_windows=batch.num_examples * batch.windows_each,
        num_prompt_tokens=len(examples[0].prompt),
        num_new_tokens=decoder._limit(examples[0]),
        num_target_tokens=batch.num_targets,
    )
    return measured, memory, shape


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_the_formula_gives_the_measured_peak(model: Path, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BatchDecoder, "is_continuous", False)
    settings = EvaluationConfig(
        num_beams=batch.num_beams,
        max_tokens_per_second=batch.tokens_per_second,
        measures_loss=batch.measures_loss,
    )
    measured, memory, shape = measured_and_planned(model, batch, settings)
    # The audio on a CPU is numpy's.
    measured += shape.num_windows * WINDOW_BYTES
    phases = memory.phases(shape)
    assert max(phases, key=lambda name: phases[name]) == batch.largest, phases
    assert memory.batch_bytes(shape) == pytest.approx(measured, rel=0.1), (measured, phases)


CONTINUOUS = [
    Batch("loss", 8, num_targets=200, measures_loss=True),
    Batch("features", 4, windows_each=8, windows_per_chunk=1),
    Batch("features", 8, tokens_per_second=4.0, windows_per_chunk=1),
    Batch("encoder", 8, windows_each=4),
]


@pytest.mark.parametrize("batch", CONTINUOUS, ids=str)
def test_the_formula_gives_the_measured_peak_of_continuous_batching(model: Path, batch: Batch) -> None:
    settings = EvaluationConfig(
        batch_size=batch.num_examples,
        max_tokens_per_second=batch.tokens_per_second,
        measures_loss=batch.measures_loss,
    )
    measured, memory, shape = measured_and_planned(model, batch, settings)
    measured += shape.num_windows // 4 * WINDOW_BYTES
    phases = memory.row_phases(shape)
    assert max(phases, key=lambda name: phases[name]) == batch.largest, phases
    planned = memory.cache_bytes(shape) + phases[batch.largest]
    assert planned == pytest.approx(measured, rel=0.1), (measured, phases)


def test_the_largest_batch_decides(model: Path) -> None:
    memory = DecodingMemory(
        read_voxtral_config(str(model)), ModelConfig(path=str(model)), EvaluationConfig(), device_type="cpu"
    )
    small, large = DecodingShape(2, 2, 80, 100, 30), DecodingShape(8, 8, 80, 100, 30)
    assert memory.peak_bytes([small, large, small]) == memory.peak_bytes([large]) > memory.peak_bytes([small])


def test_the_cache_of_one_batch_may_hold_a_group_of_another(model: Path) -> None:
    memory = DecodingMemory(
        read_voxtral_config(str(model)), ModelConfig(path=str(model)), EvaluationConfig(), device_type="cpu"
    )
    # One has the longest hypotheses, the other the longest references.
    shapes = [DecodingShape(8, 8, 80, 900, 30), DecodingShape(8, 8, 80, 100, 800)]
    long, many = shapes
    together = memory.cache_bytes(long) + memory.row_phases(many)["loss"]
    alone = [memory.cache_bytes(shape) + max(memory.row_phases(shape).values()) for shape in shapes]
    assert memory.peak_bytes(shapes) >= together > max(alone)


def test_a_static_cache_takes_its_rounded_length_from_the_prompt_on(model: Path) -> None:
    settings = EvaluationConfig(num_beams=3, static_cache=True)
    memory = DecodingMemory(read_voxtral_config(str(model)), ModelConfig(path=str(model)), settings, "cpu")
    phases = [memory.phases(DecodingShape(8, 8, 80, num_new, 30)) for num_new in (433, 500, 688, 689)]
    assert phases[0] == phases[1] == phases[2]
    # 768 positions, then 1,024.
    assert phases[3]["last token"] - phases[2]["last token"] > phases[2]["last token"] // 6
    assert phases[3]["prompt"] > phases[2]["prompt"]
