"""Bytes that a rank sends in a step, as the kernel counts them, over those that `voxtral-dist plan` computes.

    python benchmarks/communication.py --output communication.json [--quick]

A Voxtral of 9.2 million parameters in float32 under ZeRO 0 to 3 and FSDP2, all weights trained, on 2, 3 and 4 ranks
over gloo, with one micro-batch and with three in a step; besides, with a frozen encoder and in bfloat16.
Ranks are alone in a network of their own (Linux's namespaces), whose loopback interface counts what all of them send;
without one, the machine's own loopback interface counts other processes too. Headers of TCP, acknowledgements and the
sums of our own step are counted, and not computed.

`ratio` is the worst agreement of all rows: the smaller over the larger of counted and computed bytes. `sent` is in
parameters, divided by (n - 1) / n for n ranks: an all-gather of all weights is 1, an all-reduce of all gradients 2.

Predicted before the first run: at least 0.97 everywhere. It had 0.98, but for four things that are in the model since:
gloo's reductions send up to twice what they need, ZeRO-1 in bfloat16 sums by all-reduces whatever
`use_multi_rank_bucket_allreduce` says, ZeRO-3 keeps as many weights as it prefetches, and gathers embedding and last
layer for the backward pass, too. Results: docs/scaling.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from voxtral_dist.config import RunConfig
from voxtral_dist.estimate.communication import Communication
from voxtral_dist.estimate.sharding import configured_sharding
from voxtral_dist.model.tiny import TinyShape, build_tiny_voxtral
from voxtral_dist.model.voxtral import DTYPES, trained_meta_model

from workloads.command import run
from workloads.rank_traffic import enter_private_network, sent_bytes

REPOSITORY = Path(__file__).resolve().parents[1]
SHAPE = TinyShape(
    window_seconds=1.28,
    vocab_size=4096,
    encoder_width=256,
    encoder_layers=3,
    encoder_heads=4,
    text_width=320,
    text_layers=3,
    text_heads=5,
    text_kv_heads=5,
    text_ffn_width=768,
)
QUICK = TinyShape()
ENGINES: dict[str, dict[str, Any]] = {
    "zero0": {"deepspeed": "zero0"},
    "zero1": {"deepspeed": "zero1"},
    "zero2": {"deepspeed": "zero2"},
    "zero3": {"deepspeed": "zero3"},
    "fsdp2": {"fsdp2": {}},
}


@dataclass(frozen=True)
class Case:
    """A run whose bytes are counted.

    zero: values of `zero_optimization` beside those of the engine's file.
    """

    engine: str
    num_ranks: int
    num_micro_batches: int = 1
    zero: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def cases(is_quick: bool) -> Iterator[Case]:
    """All cases."""
    if is_quick:
        yield Case("zero2", 2)
        return
    for engine in ENGINES:
        for num_ranks in (2, 3, 4):
            yield Case(engine, num_ranks)
            yield Case(engine, num_ranks, 3)
    reductions = {"use_multi_rank_bucket_allreduce": False}
    for num_ranks in (2, 3, 4):
        yield Case("zero1", num_ranks, zero=reductions)
    yield Case("zero2", 3, 2, zero=reductions)
    yield Case("zero1", 2, zero=reductions, settings={"precision": "bfloat16"})
    # By default all of this model stays gathered. What is released is that of a larger one: nearly everything.
    yield Case("zero3", 3, 2, zero={"stage3_max_reuse_distance": 0})
    yield Case("zero3", 3, 2, zero={"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0})
    yield Case("fsdp2", 4, 2, settings={"engine": {"fsdp2": {"ranks_per_replica": 2}}})
    frozen = {"trainable": {"frozen": ["encoder"]}}
    for engine in ("zero2", "zero3", "fsdp2"):
        yield Case(engine, 3, settings=frozen)
    for engine in ("zero1", "zero2", "zero3", "fsdp2"):
        yield Case(engine, 2, settings={"precision": "bfloat16"})


def measure(folder: Path, is_quick: bool) -> dict[str, Any]:
    """Count all cases, one after the other."""
    is_private = enter_private_network()
    # Ranks must not be reached by the name of the machine.
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
    build_tiny_voxtral(folder / "model", QUICK if is_quick else SHAPE)
    rows = [compare(case, folder) for case in cases(is_quick)]
    return {
        "ratio": min(row["agreement"] for row in rows),
        "ratio_is": "counted and computed bytes of the row that agrees least, the smaller over the larger",
        "is_private": is_private,
        "rows": rows,
    }


def compare(case: Case, folder: Path) -> dict[str, Any]:
    """Counted and computed bytes of a case."""
    config = config_of(case, folder)
    counted = sent_bytes(config, case.num_ranks, case.num_micro_batches)
    model = trained_meta_model(config.model, config.trainable, DTYPES[config.model.precision])
    communication = Communication(model, configured_sharding(config.engine, case.num_ranks), case.num_ranks)
    computed = communication.sent_bytes(case.num_micro_batches, "gloo")
    parameters = sum(one.numel() for one in model.parameters())
    unit = parameters * DTYPES[config.model.precision].itemsize * (case.num_ranks - 1) / case.num_ranks
    row = {
        "engine": case.engine,
        "ranks": case.num_ranks,
        "micro_batches": case.num_micro_batches,
        "changed": case.zero | case.settings,
        "counted": counted / unit,
        "computed": computed / unit,
        "nccl": communication.sent_bytes(case.num_micro_batches, "nccl") / unit,
        "agreement": min(counted, computed) / max(counted, computed),
    }
    print(json.dumps(row), flush=True)
    return row


def config_of(case: Case, folder: Path) -> RunConfig:
    """The configuration of a case."""
    settings = dict(case.settings)
    engine = settings.pop("engine", ENGINES[case.engine])
    if case.zero:
        path = REPOSITORY / "ds_configs" / f"{case.engine}.json"
        zero = json.loads(path.read_text(encoding="utf-8"))["zero_optimization"] | case.zero
        changed = folder / "deepspeed.json"
        changed.write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8")
        engine = {"deepspeed": changed}
    return RunConfig.model_validate(
        {
            "run_dir": folder / "run",
            "num_steps": 100,
            "model": {"path": str(folder / "model"), "precision": settings.pop("precision", "float32")},
            "train_data": {"shards": ["none"], "max_examples": 1},
            "optimizer": {"learning_rate": 1e-4, "warmup_steps": 1},
            "engine": engine,
            **settings,
        }
    )


if __name__ == "__main__":
    run(__doc__, measure, ("ratio",))
