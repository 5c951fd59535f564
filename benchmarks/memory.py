"""Memory of a process by optimizer: ours under FSDP2, and Hugging Face's `Seq2SeqTrainer`, on the same batches.

    python benchmarks/memory.py --output memory.json [--quick]

A Voxtral of 0.42 billion parameters (half the widths of Voxtral-Mini-3B, 12 blocks of each kind, an eighth of the
vocabulary) with windows of 5.12 s; one of AN4's clips to a micro-batch, computed in float32; one process, as on one
GPU. Peak resident memory in the second step, minus that of the process before the model is built:

- `adamw`: float32 weights, gradients and moments, 16 bytes per parameter;
- `adamw_8bit`: 10 bytes; `bfloat16`: weights and gradients in bfloat16, rounded stochastically, 12 bytes; `both`: 6;
- `trainer`: the trainer with its own AdamW, 16 bytes. It offers no stochastic rounding.

Offloading is no contender: on a CPU it moves nothing. `ratio` is `adamw` over `both`.

Predicted before the first run, for 2 ranks that share the states, in GB per rank: half of the states, and 0.8 of
gathered weights, unreduced gradients, activations and libraries: 4.2 for `adamw` and the trainer, 2.9 for `adamw_8bit`,
3.3 for `bfloat16`, 2.1 for both: a ratio of 2.0. Measured: 3.70, 3.75, 2.74, 3.12 and 2.08: a ratio of 1.78,
because `adamw` needs 0.5 less than predicted. The fewer ranks share the states, the more they count: one process needs
6.86, 6.78, 5.02, 5.35 and 3.34, a ratio of 2.05.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from voxtral_dist.config import TrainDataConfig
from voxtral_dist.data.training_set import build_training_set
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.model.tiny import TinyShape, build_tiny_voxtral

from rivals.training_runs import OURS, TRAINER, TrainingRun
from workloads.command import run
from workloads.peak_memory import MMAP_THRESHOLD_BYTES, in_fresh_process
from workloads.speech import short_clips, source, write_clips

HALF_OF_3B = TinyShape(
    window_seconds=5.12,
    vocab_size=16_384,
    encoder_width=640,
    encoder_layers=12,
    encoder_heads=10,
    text_width=1536,
    text_layers=12,
    text_heads=12,
    text_kv_heads=4,
    text_ffn_width=4096,
)
QUICK = TinyShape(window_seconds=5.12, text_width=256, text_ffn_width=256)
NUM_RANKS = 1
# The first is a warm-up.
NUM_STEPS = 2
LOSS_TOLERANCE = 1e-3
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "trainer": (TRAINER, {"fsdp2": False}),
    "adamw": (OURS, {}),
    "adamw_8bit": (OURS, {"optimizer": "adamw_8bit"}),
    "bfloat16": (OURS, {"master_weights": False}),
    "both": (OURS, {"optimizer": "adamw_8bit", "master_weights": False}),
}


def measure(folder: Path, is_quick: bool) -> dict[str, Any]:
    """Measure all contenders, one after the other."""
    # The model is written by a process of its own: this one must not keep its memory.
    model = in_fresh_process(build, folder / "model", QUICK if is_quick else HALF_OF_3B)
    asked = _run(folder, str(folder / "model"))
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(MMAP_THRESHOLD_BYTES)
    answers = {
        name: replace(asked, folder=folder / name, **settings).measure(script, 0)
        for name, (script, settings) in CONTENDERS.items()
    }
    losses = {name: ranks[0]["losses"][0] for name, ranks in answers.items()}
    if any(abs(loss - losses["trainer"]) > LOSS_TOLERANCE * losses["trainer"] for loss in losses.values()):
        raise RuntimeError(f"All must begin with the same loss, but they are {losses}.")
    peaks = {
        name: max(rank["peak_host_bytes"] - rank["host_bytes_before_the_model"] for rank in ranks)
        for name, ranks in answers.items()
    }
    return {
        "ratio": peaks["adamw"] / peaks["both"],
        "ratio_is": "peak memory of a process, `adamw` over 8-bit moments and bfloat16 weights",
        "gigabytes": {name: round(peak / 1e9, 2) for name, peak in peaks.items()},
        "trainer_over": {name: peaks["trainer"] / peak for name, peak in peaks.items()},
        "losses": {name: ranks[0]["losses"] for name, ranks in answers.items()},
        "num_ranks": NUM_RANKS,
        "source": source(),
        **model,
        "answers": answers,
    }


def build(folder: Path, shape: TinyShape) -> dict[str, Any]:
    """Write the model; return its size."""
    build_tiny_voxtral(folder, shape)
    float32_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {"parameters": float32_bytes // 4}


def _run(folder: Path, model: str) -> TrainingRun:
    """Request for the steps, with utterances in our order."""
    files = write_clips(folder / "corpus", short_clips(NUM_RANKS * (NUM_STEPS + 1)))
    data = TrainDataConfig(
        shards=(str(files.corpus.shards),), slots_per_step=NUM_RANKS, max_examples=1, untagged_fraction=0.0
    )
    plan = build_training_set(data, VoxtralPrompts.from_pretrained(model), seed=0).plan
    slots = [plan.slot(step, slot).utterance_ids for step in range(NUM_STEPS) for slot in range(NUM_RANKS)]
    return TrainingRun(
        model=model,
        shards=str(files.corpus.shards),
        utterances=tuple(files.clips[number] for ids in slots for number in ids),
        folder=folder,
        world_size=NUM_RANKS,
        batch_size=1,
        slots_per_step=NUM_RANKS,
        num_steps=NUM_STEPS,
        fsdp2=True,
    )


if __name__ == "__main__":
    run(__doc__, measure, ("ratio", "gigabytes"))
