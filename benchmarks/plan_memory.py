"""Memory that `voxtral-dist plan` estimates against the memory of real runs, on CPU ranks.

    python benchmarks/plan_memory.py --output plan_memory.json [--quick]

Random models of three sizes under ZeRO 1, 2, 3, and 3 with the optimizer or everything in host memory: two ranks, three
steps of two micro-batches each, in float32; the small model also in bfloat16 and with activation checkpointing.
Measured: peak resident memory of a rank, minus that of a process that has imported everything and joined the others.
Predicted: the largest phase of the estimate for `device: cpu`, from shapes alone. The machine needs as much free memory
as the ranks take; otherwise the kernel drops pages of files, and the measured peak is too small.

`ratio` is the worst agreement of all rows: the smaller over the larger of predicted and measured.

Predicted before the first run: at least 0.85 everywhere. Results: docs/benchmarks.md.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from voxtral_dist.model.tiny import TinyShape, build_tiny_voxtral

from workloads.command import run
from workloads.rank_memory import compare, run_config

REPOSITORY = Path(__file__).resolve().parents[1]
SMALL = TinyShape(
    window_seconds=5.12,
    vocab_size=4096,
    encoder_width=320,
    encoder_layers=6,
    encoder_heads=5,
    text_width=384,
    text_layers=6,
    text_heads=6,
    text_kv_heads=2,
    text_ffn_width=1024,
)
MIDDLE = replace(
    SMALL,
    vocab_size=8192,
    encoder_width=640,
    encoder_heads=10,
    text_width=768,
    text_heads=12,
    text_kv_heads=4,
    text_ffn_width=1792,
)
LARGE = replace(
    MIDDLE,
    encoder_width=1024,
    encoder_layers=8,
    encoder_heads=16,
    text_width=1280,
    text_layers=8,
    text_heads=20,
    text_ffn_width=2816,
)
STAGES = ("zero1", "zero2", "zero3", "zero3_offload_optimizer", "zero3_offload")
NUM_EXAMPLES, NUM_TARGETS = 4, 40


def measure(folder: Path, is_quick: bool) -> dict[str, Any]:
    """Compare all models under all shardings."""
    shapes = {"small": SMALL} if is_quick else {"small": SMALL, "middle": MIDDLE, "large": LARGE}
    stages = ("zero3",) if is_quick else STAGES
    rows = []
    for name, shape in shapes.items():
        model = folder / name
        build_tiny_voxtral(model, shape)
        rows += [{"model": name, "stage": stage} | _row(model, stage) for stage in stages]
        if name == "small" and not is_quick:
            rows += [_variant(model, stage, **change) for stage in ("zero1", "zero3") for change in _VARIANTS]
    return {
        "ratio": min(row["agreement"] for row in rows),
        "ratio_is": "the smaller over the larger of predicted and measured peaks, minimum over rows",
        "agreements": {f"{row['model']}, {row['stage']}": round(row["agreement"], 3) for row in rows},
        "rows": rows,
    }


_VARIANTS: tuple[dict[str, Any], ...] = (
    {"precision": "bfloat16"},
    {"activation_checkpointing": {"encoder": 1, "language_model": 1}},
)


def _variant(model: Path, stage: str, **change: Any) -> dict[str, Any]:
    return {"model": f"small, {next(iter(change))}", "stage": stage} | _row(model, stage, **change)


def _row(model: Path, stage: str, **change: Any) -> dict[str, Any]:
    config = run_config(model, zero_settings(stage), model, **change)
    return compare(config, NUM_EXAMPLES, NUM_TARGETS)


def zero_settings(stage: str) -> dict[str, Any]:
    """`zero_optimization` of a file in ds_configs, or of stage 3 with only the optimizer in host memory."""
    if stage == "zero3_offload_optimizer":
        return zero_settings("zero3") | {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
    settings: dict[str, Any] = json.loads((REPOSITORY / "ds_configs" / f"{stage}.json").read_text(encoding="utf-8"))
    zero: dict[str, Any] = settings["zero_optimization"]
    return zero


if __name__ == "__main__":
    run(__doc__, measure, ("ratio", "agreements"))
