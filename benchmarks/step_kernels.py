"""Kernels' time of a training step before and after each change, by the roofline of `voxtral-dist plan`: without a GPU.

    python benchmarks/step_kernels.py --output step_kernels.json [--quick]

Voxtral-Mini-3B in bfloat16 on one H200, all weights trained by FSDP2, a micro-batch of 8 clips of 30 s with 60 target
tokens in 445 positions. Each row is one more change: batches padded on the left, which need a mask in the language
model, with all blocks checkpointed; right padding with causal attention and no mask; activations that are kept;
compiled blocks. The first row's blocks take a mask of that shape, so transformers repeats keys and values for each
query, and attention computes all pairs, as on a GPU. Then the last row on all GPUs that `plan` knows.

`ratio` is the time of the first row over that of the last.

Predicted by a first version of the roofline: 360 ms with masks and checkpoints; kept 290 ms with masks and 284 without;
compiled 246. Casts and update of FSDP2 on one GPU: 54 ms, and 48 to 105. Results: docs/performance.md.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from voxtral_dist.config import ActivationCheckpointingConfig, ModelConfig, OptimizerConfig, TrainableConfig
from voxtral_dist.estimate.activations import MicroBatchShape
from voxtral_dist.estimate.engine_traffic import engine_traffic
from voxtral_dist.estimate.estimator import meta_model_of
from voxtral_dist.estimate.gpus import GPUS, Gpu
from voxtral_dist.estimate.kernels import Kernel, compiled
from voxtral_dist.estimate.roofline import Roofline
from voxtral_dist.estimate.sharding import Fsdp2Sharding
from voxtral_dist.estimate.trace import StepTracer
from voxtral_dist.model.flops import BatchShape, TrainingFlops
from voxtral_dist.model.published import MINI

from workloads.command import run

TRAINABLE = TrainableConfig()
OPTIMIZER = OptimizerConfig(learning_rate=1e-5)
CHECKPOINTED = ActivationCheckpointingConfig(encoder=1, language_model=1)
KEPT = ActivationCheckpointingConfig()
PRECISION = "bfloat16"


def measure(folder: Path, is_quick: bool) -> dict[str, Any]:
    """The rows of one H200, and the last row on each GPU."""
    batch = 1 if is_quick else 8
    shape = MicroBatchShape(batch, batch, num_positions=445, num_target_tokens=60 * batch)
    with_masks = _kernels(CHECKPOINTED, shape, has_masks=True)
    checkpointed = _kernels(CHECKPOINTED, shape)
    kept = _kernels(KEPT, shape)
    changes = {
        "left padding with masks, checkpointed": with_masks,
        "right padding without masks, checkpointed": checkpointed,
        "right padding without masks, kept": kept,
        "right padding without masks, kept, compiled": compiled(kept),
    }
    others = {
        "left padding with masks, kept": _kernels(KEPT, shape, has_masks=True),
        "right padding without masks, checkpointed, compiled": compiled(checkpointed),
    }
    rows = {name: _row(GPUS["H200"], kernels, shape) for name, kernels in (changes | others).items()}
    first, *_, last = (rows[name]["kernels"]["seconds"] for name in changes)
    return {
        "ratio": first / last,
        "ratio_is": "time of the model's kernels with masks and checkpoints over that without, and compiled",
        "milliseconds": {name: round(1e3 * row["kernels"]["seconds"], 1) for name, row in rows.items()},
        "rows": rows,
        "gpus": {name: _row(gpu, compiled(kept), shape) for name, gpu in GPUS.items()},
    }


def _config(checkpointing: ActivationCheckpointingConfig) -> ModelConfig:
    return ModelConfig(path=MINI, precision=PRECISION, activation_checkpointing=checkpointing)


def _kernels(
    checkpointing: ActivationCheckpointingConfig, shape: MicroBatchShape, *, has_masks: bool = False
) -> list[Kernel]:
    tracer = StepTracer(_config(checkpointing), TRAINABLE)
    if has_masks:
        for block in tracer.model.model.language_model.layers:
            block.register_forward_pre_hook(_with_mask, with_kwargs=True)
    return tracer.trace(shape)


def _with_mask(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    hidden = arguments[0]
    batch, length, _ = hidden.shape
    return arguments, named | {"attention_mask": torch.zeros((batch, 1, length, length), dtype=hidden.dtype)}


def _row(gpu: Gpu, kernels: list[Kernel], shape: MicroBatchShape) -> dict[str, Any]:
    roofline, config = Roofline(gpu, PRECISION), _config(KEPT)
    model = meta_model_of(config, TRAINABLE)
    traffic = engine_traffic(model, Fsdp2Sharding(), OPTIMIZER, 1)
    time = roofline.time(kernels)
    casts, update = map(roofline.traffic_seconds, (traffic.first_micro_batch, traffic.update))
    positions = [shape.num_positions] * shape.num_examples
    needed = BatchShape.needed(shape.num_windows, positions, shape.num_target_tokens)
    rate = TrainingFlops(model, config).model(needed) / gpu.peak_flops(PRECISION)
    step_seconds = time.seconds + casts + update
    return {
        "kernels": asdict(time),
        "mfu_of_kernels": rate / time.seconds,
        "cast_seconds": casts,
        "update_seconds": update,
        "step_seconds": step_seconds,
        "clips_per_second": shape.num_windows / step_seconds,
        "mfu_of_step": rate / step_seconds,
    }


if __name__ == "__main__":
    run(__doc__, measure, ("ratio", "milliseconds"))
