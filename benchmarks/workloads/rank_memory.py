"""Peak resident memory of the ranks of a real run on a CPU, and the estimate of it.

Each rank is a fresh process, forked by a server that has only imported the package. The memory that it has after
joining the others and loading its tokenizer is subtracted.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from voxtral_dist.config import RunConfig
from voxtral_dist.data.examples.example import Example
from voxtral_dist.estimate.activations import Activations, MicroBatchShape
from voxtral_dist.estimate.estimator import estimate_memory
from voxtral_dist.estimate.phases import ModelSizes, Setting
from voxtral_dist.estimate.sharding import configured_sharding
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.model.tekken import NUM_SPECIAL_TOKENS
from voxtral_dist.model.voxtral import DTYPES, trained_meta_model

from workloads.gloo_ranks import join_ranks, run_ranks
from workloads.peak_memory import MMAP_THRESHOLD_BYTES, forget_peak, status_bytes

NUM_STEPS = 3
MICRO_BATCHES_PER_STEP = 2
NUM_RANKS = 2
_TIMEOUT_SECONDS = 1800


def examples_of(prompts: VoxtralPrompts, num_examples: int, num_target_tokens: int) -> list[Example]:
    """Examples of one window of noise and a transcript of byte tokens; every other one is shorter, to have padding."""
    rng = np.random.default_rng(0)
    lengths = [num_target_tokens - number % 2 for number in range(num_examples)]
    return [
        Example(
            utterance_id=number,
            key="",
            pcm=rng.normal(0, 3000, prompts.window_samples).astype(np.int16),
            num_windows=1,
            prompt=prompts.transcription("en", 1),
            completion=(
                *rng.integers(NUM_SPECIAL_TOKENS, NUM_SPECIAL_TOKENS + 256, length - 1).tolist(),
                prompts.eos_id,
            ),
            reference="",
            duration_seconds=prompts.window_seconds,
        )
        for number, length in enumerate(lengths)
    ]


def run_config(model: Path, zero: dict[str, Any], folder: Path, **model_settings: Any) -> RunConfig:
    """A run of `NUM_STEPS` under a DeepSpeed file with this `zero_optimization`."""
    deepspeed = folder / "deepspeed.json"
    deepspeed.write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8")
    return RunConfig.model_validate(
        {
            "run_dir": folder / "run",
            "num_steps": NUM_STEPS,
            "model": {"path": str(model), "precision": "float32"} | model_settings,
            "train_data": {"shards": ["none"], "max_examples": 1},
            "optimizer": {"learning_rate": 1e-4, "warmup_steps": 1},
            "engine": {"deepspeed": deepspeed},
        }
    )


def compare(config: RunConfig, num_examples: int, num_target_tokens: int) -> dict[str, Any]:
    """Measured and predicted bytes, maximum over ranks, and their agreement: the smaller over the larger."""
    prompts = VoxtralPrompts.from_pretrained(config.model.path)
    examples = examples_of(prompts, num_examples, num_target_tokens)
    peaks = measured_peaks(config, num_examples, num_target_tokens)
    predicted = predicted_phases(config, examples)
    measured, expected = max(peaks), max(predicted.values())
    return {
        "parameters": sum(
            one.numel() for one in trained_meta_model(config.model, config.trainable, torch.float32).parameters()
        ),
        "measured_bytes": measured,
        "predicted_bytes": expected,
        "agreement": min(measured, expected) / max(measured, expected),
        "predicted_phases": predicted,
        "measured_of_ranks": peaks,
    }


def predicted_phases(config: RunConfig, examples: Sequence[Example]) -> dict[str, float]:
    """Predicted bytes of a process in each phase."""
    dtype = DTYPES[config.model.precision]
    model = trained_meta_model(config.model, config.trainable, dtype)
    positions = max(len(one.prompt) + len(one.completion) - 1 for one in examples)
    targets = sum(len(one.completion) for one in examples)
    shape = MicroBatchShape(len(examples), len(examples), positions, targets)
    found = estimate_memory(
        configured_sharding(config.engine, NUM_RANKS),
        ModelSizes.of(model, config.optimizer),
        Activations(model, config.model).parts(shape),
        Setting("cpu", NUM_RANKS, MICRO_BATCHES_PER_STEP, dtype.itemsize),
    )
    return {phase.name: phase.device_bytes + phase.host_bytes for phase in found.phases}


def measured_peaks(config: RunConfig, num_examples: int, num_target_tokens: int) -> list[int]:
    """Bytes that each of `NUM_RANKS` ranks adds at its peak in three steps of training."""
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD_BYTES), "DS_ACCELERATOR": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        arguments = (Path(folder), config, num_examples, num_target_tokens)
        run_ranks(NUM_RANKS, _train, *arguments, limit_seconds=_TIMEOUT_SECONDS)
        return [int((Path(folder) / f"peak-{rank}").read_text(encoding="ascii")) for rank in range(NUM_RANKS)]


def _train(rank: int, folder: Path, config: RunConfig, num_examples: int, num_target_tokens: int) -> None:
    """Run three steps on one rank, by the engine and update of a run, and write its peak memory to a file."""
    import torch.distributed as dist

    from voxtral_dist.data.examples.micro_batch import collate
    from voxtral_dist.data.loader import StepBatches
    from voxtral_dist.engine.build import build_engine
    from voxtral_dist.model.features import LogMel
    from voxtral_dist.train import build_train_step

    world = join_ranks(rank, NUM_RANKS, folder)
    prompts = VoxtralPrompts.from_pretrained(config.model.path)
    batch = collate(examples_of(prompts, num_examples, num_target_tokens), prompts)
    log_mel = LogMel.from_pretrained(config.model.path, world.device)
    before = status_bytes("VmRSS")
    engine = build_engine(config, log_mel, world)
    train_step = build_train_step(config, engine, world)
    forget_peak()
    for step in range(NUM_STEPS):
        train_step.run(StepBatches(step, [batch] * MICRO_BATCHES_PER_STEP))
    (folder / f"peak-{rank}").write_text(str(status_bytes("VmHWM") - before), encoding="ascii")
    dist.barrier()
    # Threads of gloo may abort a process that ends in the usual way.
    os._exit(0)
