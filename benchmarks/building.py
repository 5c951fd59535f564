"""Peak memory of each rank while it builds a model for ZeRO-3, relative to the size of the model.

A random Voxtral of about 1.1 GB in float32 is stored as a normal folder. Each rank then builds it

- ours: on the meta device; parameters are then read, broadcast and sharded one by one;
- peer: by transformers' `from_pretrained` on each rank, as most training scripts do before `deepspeed.initialize`,
  which then shards it.

Both end with the same partitions. DeepSpeed's memory for updates (float32 copies, gradients) is allocated later and
equal for both; it is not measured. Predicted for W ranks, before the first run: 1/W of the model plus twice its largest
parameter (6 % of it here) for ours, that is 0.62 with 2 ranks and 0.37 with 4; 1 + 1/W for the peer, so a ratio of 3.4
with 4 ranks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from voxtral_dist.config import ModelConfig, RunConfig
from voxtral_dist.distributed.world import World
from voxtral_dist.model.tiny import TinyShape, build_tiny_voxtral

from workloads.command import run
from workloads.peak_memory import MMAP_THRESHOLD_BYTES, added_peak

NUM_RANKS = (2, 4)
SETTINGS = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
SHAPE = TinyShape(
    vocab_size=16_384,
    encoder_width=512,
    text_width=1024,
    text_layers=14,
    text_heads=16,
    text_kv_heads=16,
    text_ffn_width=4096,
)


def measure(folder: Path, quick: bool) -> dict[str, Any]:
    """Peak memory of each rank over the size of the model, by contender and number of ranks."""
    build_tiny_voxtral(folder / "small")
    build_tiny_voxtral(folder / "model", TinyShape() if quick else SHAPE)
    (folder / "zero3.json").write_text(json.dumps(SETTINGS), encoding="utf-8")
    model_bytes = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
    fractions = {
        name: {
            str(num_ranks): [peak / model_bytes for peak in in_ranks(num_ranks, build, folder)]
            for num_ranks in (NUM_RANKS[:1] if quick else NUM_RANKS)
        }
        for name, build in {"ours": build_ours, "peer": build_peer}.items()
    }
    most = max(fractions["ours"], key=int)
    return {
        "model_bytes": model_bytes,
        "peak_over_model_size": fractions,
        "ratio": median(fractions["peer"][most]) / median(fractions["ours"][most]),
    }


def in_ranks(num_ranks: int, build: Callable[[RunConfig, World], object], folder: Path) -> list[int]:
    """Bytes that building a model adds, at the peak, to each process that takes part."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(MMAP_THRESHOLD_BYTES)
    store = folder / f"store-{build.__name__}-{num_ranks}"
    with ProcessPoolExecutor(num_ranks, mp_context=get_context("spawn")) as pool:
        ranks = [pool.submit(_in_rank, build, folder, store, rank, num_ranks) for rank in range(num_ranks)]
        return [one.result() for one in ranks]


def _in_rank(build: Callable[[RunConfig, World], object], folder: Path, store: Path, rank: int, num_ranks: int) -> int:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    shared = dist.FileStore(str(store), num_ranks)
    dist.init_process_group("gloo", store=shared, rank=rank, world_size=num_ranks, timeout=timedelta(minutes=20))
    world = World(rank, num_ranks, rank, torch.device("cpu"))
    kept = []

    def build_from(name: str) -> float:
        kept[:] = [build(_config(folder, name), world)]
        dist.barrier()
        return 0.0

    peak: int = added_peak(lambda: build_from("model"), lambda: build_from("small"))["added_peak_bytes"]
    dist.destroy_process_group()
    return peak


def build_ours(config: RunConfig, world: World) -> object:
    """Build the model like a run does."""
    from voxtral_dist.engine.zero.building import fill_model
    from voxtral_dist.model.voxtral import trained_meta_model
    from voxtral_dist.model.weights import InitialWeights

    model = trained_meta_model(config.model, config.trainable, torch.float32)
    initial = InitialWeights(config.model.path, model, config.seed)
    fill_model(model, initial, _deepspeed_settings(config, model, world), world)
    return model


def build_peer(config: RunConfig, world: World) -> object:
    """Build the full model on each rank, then shard it like `deepspeed.initialize`."""
    import deepspeed
    from transformers import VoxtralForConditionalGeneration

    model = VoxtralForConditionalGeneration.from_pretrained(config.model.path, dtype=torch.float32)
    deepspeed.zero.Init(module=model, config_dict_or_path=_deepspeed_settings(config, model, world))
    return model


def _deepspeed_settings(config: RunConfig, model: torch.nn.Module, world: World) -> dict[str, Any]:
    from voxtral_dist.engine.zero.settings import complete_settings, read_settings

    settings = read_settings(config.engine, config.run_dir)
    return complete_settings(settings, config.model, config.optimizer, model, world.size)


def _config(folder: Path, name: str) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run_dir": folder / "run",
            "num_steps": 1,
            "model": ModelConfig(path=str(folder / name), precision="float32"),
            "train_data": {"shards": ["none"], "max_examples": 1},
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
            "engine": {"deepspeed": folder / "zero3.json"},
        }
    )


if __name__ == "__main__":
    run(__doc__, measure, ("ratio", "peak_over_model_size", "model_bytes"))
