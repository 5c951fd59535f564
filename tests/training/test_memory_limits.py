"""A micro-batch that does not fit is divided on all ranks: the gradient stays, and the run goes on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from voxtral_dist.config import RunConfig, SpecAugmentConfig
from voxtral_dist.data.examples.dividing import divided
from voxtral_dist.data.examples.micro_batch import MicroBatch
from voxtral_dist.data.loader import build_train_loader
from voxtral_dist.distributed.world import World, alone
from voxtral_dist.errors import RetryError
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.training.memory_limits import LIMITS_FILE, Exceeded, MemoryLimits
from voxtral_dist.training.metrics_file import read_metrics

from ranks import Ended, run_programs, run_ranks
from runs import ROOT, free_port, run_config, train_as_users_do, write_config
from test_equations import NUM_STEPS, Curve, Weights, assert_same, train_plainly, train_sharded

CPU = alone("cpu")
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. Including non-PyTorch memory, ...")
ENGINES: dict[str, dict[str, Any]] = {
    "FSDP2": {"fsdp2": {}},
    "ZeRO-2": {"deepspeed": ROOT / "ds_configs" / "zero2.json"},
    "ZeRO-3": {"deepspeed": ROOT / "ds_configs" / "zero3.json"},
}


def config_of(folder: Path, model: Path, shards: Path, engine: str, **sections: Any) -> RunConfig:
    """A run with up to four examples in a micro-batch, of which one rank has one less in each step."""
    config = run_config(folder, model, shards, num_steps=NUM_STEPS, slots_per_step=3, **sections)
    tree = config.model_dump()
    tree["train_data"] |= {"max_examples": 4, "spec_augment": SpecAugmentConfig() if "spec" in engine else None}
    return RunConfig.model_validate(tree | {"engine": ENGINES.get(engine, {"fsdp2": {}})})


def micro_batches(config: RunConfig) -> list[MicroBatch]:
    prompts = VoxtralPrompts.from_pretrained(config.model.path)
    loader = build_train_loader(config.train_data, prompts, config.seed, NUM_STEPS, 0, 1)
    return [batch for batches in loader.starting_at(0) for batch in batches.micro_batches]


@pytest.mark.parametrize("num_parts", [2, 4])
def test_parts_are_the_micro_batch(num_parts: int, tiny_model: Path, shard_folder: Path, tmp_path: Path) -> None:
    whole = next(
        batch
        for batch in micro_batches(config_of(tmp_path, tiny_model, shard_folder, "spec"))
        if len(batch.keys) == 3 and len(set(batch.windows_per_example)) > 1
    )
    parts = divided(whole, num_parts)
    assert len(parts) == num_parts
    real = [part for part in parts if part.num_utterances]
    assert len(real) == min(num_parts, 3)
    assert sum((part.keys for part in real), ()) == whole.keys
    assert torch.equal(torch.cat([part.pcm for part in real]), whole.pcm)
    assert torch.equal(torch.cat([part.target_ids for part in real]), whole.target_ids)
    assert sum(part.audio_seconds for part in parts) == pytest.approx(whole.audio_seconds)
    labels = [row[row >= 0].tolist() for part in real for row in part.labels]
    assert labels == [row[row >= 0].tolist() for row in whole.labels]
    assert all(part.input_ids.shape[1] == max(part.positions_per_example) for part in parts)
    num_windows, masks = 0, []
    for part in real:
        masks.append(part.feature_masks + torch.tensor([num_windows, 0, 0, 0]))
        num_windows += part.num_windows
    assert torch.equal(torch.cat(masks), whole.feature_masks)
    for part in parts:
        audio = part.input_ids.flatten()[part.audio_places]
        assert (audio == audio[0]).all()
        assert len(audio) == len(whole.audio_places) * part.num_windows // whole.num_windows
    assert all(part.num_target_tokens == 0 for part in parts if not part.num_utterances)


def test_parts_are_smaller_than_what_did_not_fit_until_they_hold_one_example(
    tiny_model: Path, shard_folder: Path, tmp_path: Path
) -> None:
    config = config_of(tmp_path, tiny_model, shard_folder, "FSDP2")
    assert MemoryLimits.read(config, CPU).num_parts(8, 10**9) == 1
    batch = next(one for one in micro_batches(config) if len(one.keys) == 3)
    with pytest.raises(RetryError, match=r"Rank 0 ran out of GPU memory in step 6 .*rerun the same command") as refusal:
        MemoryLimits(config, CPU).learn(batch, 5, FULL)
    assert refusal.value.exit_code == 75
    with (tmp_path / LIMITS_FILE).open("a") as file:
        file.write("damaged\n{}\n")
    limits = MemoryLimits.read(config, CPU)
    size = batch.input_ids.numel()
    assert limits.exceeded == [replace(limits.exceeded[0], rank=0, at_step=6, num_examples=3, num_positions=size)]
    assert limits.num_parts(3, size) == 2
    assert limits.num_parts(3, math.ceil(0.9 * size)) == 2
    assert limits.num_parts(3, math.floor(0.8 * size)) == 1
    assert limits.num_parts(3, 3 * size) == 4
    assert limits.num_parts(3, 100 * size) == 4
    assert str(size) not in str(limits)
    larger = config.model_copy(update={"model": config.model.model_copy(update={"loss_chunk_tokens": 7})})
    assert MemoryLimits.read(larger, CPU).num_parts(3, size) == 1, "another configuration needs other memory"
    alone_in_it = divided(batch, 4)[0]
    MemoryLimits(config, CPU).learn(alone_in_it, 5, FULL)


def train_divided(world: World, configs: list[RunConfig], num_positions: int) -> list[tuple[Curve, Weights]]:
    from voxtral_dist import train

    def limited(config: RunConfig, world: World) -> MemoryLimits:
        setting = MemoryLimits(config, world)._setting
        return MemoryLimits(config, world, [Exceeded(setting, 1, 1, 4, num_positions)])

    train.MemoryLimits = limited  # type: ignore[assignment, misc]
    return [train_sharded(world, config) for config in configs]


def test_gradients_of_divided_micro_batches_are_those_of_whole_ones(
    tiny_model: Path, shard_folder: Path, tmp_path: Path
) -> None:
    configs = [config_of(tmp_path, tiny_model, shard_folder, engine) for engine in ENGINES]
    sizes = sorted(batch.input_ids.numel() for batch in micro_batches(configs[0]))
    # Some micro-batches are divided in two, the largest in four, others not.
    num_positions = sizes[len(sizes) // 2]
    assert sizes[-1] > 0.9 * num_positions > sizes[0]
    expected = train_plainly(configs[0])
    for results in run_ranks(2, train_divided, configs, num_positions):
        for engine, result in zip(ENGINES, results, strict=True):
            assert_same(result, expected, engine)


def _train_with_little_memory(rank: int, arguments: list[str], port: int, run_dir: Path) -> None:
    """Train as `train_as_users_do` does; after two steps, memory runs out on rank 1 in the middle of a forward pass."""
    import runs

    attention: Callable[..., torch.Tensor] = torch.nn.functional.scaled_dot_product_attention
    num_calls = 0

    def attention_of_little_memory(query: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        nonlocal num_calls
        if rank == 1 and query.shape[0] > 1 and (run_dir / "checkpoints" / "step-0000002" / "complete.json").exists():
            num_calls += 1
            if num_calls == 2:
                raise FULL
        return attention(query, *others, **named)

    torch.nn.functional.scaled_dot_product_attention = attention_of_little_memory  # type: ignore[assignment]
    runs._run_command(rank, arguments, port)


def train_with_little_memory(config: RunConfig) -> Ended:
    arguments = ["train", f"--config={write_config(config)}"]
    ended = run_programs(2, _train_with_little_memory, arguments, free_port(), config.run_dir, limit_seconds=120)
    return Ended(max(one.code for one in ended), "".join(one.output for one in ended))


@pytest.mark.parametrize(
    "engine", ["FSDP2", *(pytest.param(one, marks=pytest.mark.slow) for one in ENGINES if one != "FSDP2")]
)
def test_a_run_whose_memory_ran_out_on_one_rank_goes_on_with_parts(
    engine: str, tiny_model: Path, shard_folder: Path, tmp_path: Path
) -> None:
    checkpoint = {"every_steps": 1, "asynchronous": False}
    config = config_of(
        tmp_path / "run", tiny_model, shard_folder, engine, checkpoint=checkpoint, export={"layouts": []}
    )
    ended = train_with_little_memory(config)
    assert ended.code == 75, ended.output
    assert "Rank 1 ran out of GPU memory in step 3 (CUDA out of memory. Tried to allocate 2.00 GiB)" in ended.output
    assert "Traceback" not in ended.output
    ended = train_as_users_do(config, 2)
    assert ended.code == 0, ended.output
    assert ended.output.count("positions or more are divided, because rank 1 ran out of memory at step 3") == 1
    rows = read_metrics(config.run_dir / "metrics.jsonl")
    steps = [row for row in rows if row["kind"] == "train"]
    curve, _ = train_plainly(config)
    assert [row["loss"] for row in steps] == pytest.approx([loss for loss, _ in curve], rel=2e-5)
    assert sum(row["num_divided"] for row in steps) > 0
    assert [row["num_divided"] for row in steps[:2]] == [0, 0], "they were whole"
    (event,) = (row for row in rows if row.get("event") == "divided")
    assert (event["rank"], event["at_step"], event["step"]) == (1, 3, 2)
