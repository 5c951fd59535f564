"""Every ZeRO stage on any number of ranks trains like one plain process on the full batch, in float32."""

from __future__ import annotations

import gc
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import VoxtralForConditionalGeneration

from voxtral_dist.config import RunConfig, TrainableConfig
from voxtral_dist.data.examples.micro_batch import IGNORED_LABEL, MicroBatch
from voxtral_dist.data.loader import build_train_loader
from voxtral_dist.distributed.collectives import from_first_rank
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.engine import Engine
from voxtral_dist.engine.optim import learning_rate, parameter_groups
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.model.weights import load_voxtral

from ranks import run_ranks
from runs import ROOT, run_config

NUM_STEPS = 5
Curve = list[tuple[float, float]]
Weights = dict[str, torch.Tensor]


def train_sharded(world: World, config: RunConfig) -> tuple[Curve, Weights]:
    """(loss, gradient norm) of every step, and the weights at the end, with their averages as `NAME//ema`."""
    from voxtral_dist.engine.build import build_engine
    from voxtral_dist.train import build_train_step

    prompts = VoxtralPrompts.from_pretrained(config.model.path)
    loader = build_train_loader(config.train_data, prompts, config.seed, NUM_STEPS, world.rank, world.size)
    log_mel = LogMel.from_pretrained(config.model.path, world.device)
    engine = build_engine(config, log_mel, world, loader.training_set.max_windows_per_micro_batch)
    train_step = build_train_step(config, engine, world)
    curve = []
    for batches in loader.starting_at(0):
        metrics = train_step.run(batches).metrics
        curve.append((metrics.loss, metrics.grad_norm))
    averages = averages_of(engine) if config.optimizer.ema_decay else {}
    return curve, from_first_rank(dict(engine.weights()) | averages, world)


def averages_of(engine: Engine) -> Weights:
    """The averages on rank 0, after a check that ranks decode with them, and with the weights again afterwards."""
    before = decoded_with(engine)
    with engine.averaged_weights():
        averages = {f"{name}//ema": one for name, one in engine.weights() if name in engine.parameter_shapes()}
        during = decoded_with(engine)
    for name, average in averages.items():
        assert torch.equal(during[name.removesuffix("//ema")], average), name
    after = decoded_with(engine)
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    assert not all(torch.equal(weight, during[name]) for name, weight in before.items())
    return averages


def decoded_with(engine: Engine) -> Weights:
    with engine.full_weights() as model:
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def logits_in_decoding(world: World, config: RunConfig) -> tuple[Tensor, Tensor]:
    """Logits of the copy for decoding, which has no hooks, and of the sharded model."""
    from voxtral_dist.engine.build import build_engine

    engine = build_engine(config, LogMel.from_pretrained(config.model.path, world.device), world)
    ids = torch.arange(300, 320)[None]
    with torch.no_grad(), engine.full_weights() as whole:
        found = whole(input_ids=ids).logits
    with torch.no_grad(), engine.sharded_weights() as sharded:
        return found, sharded(input_ids=ids).logits


def train_plainly(
    config: RunConfig, model: VoxtralForConditionalGeneration | None = None, skipped: Collection[int] = ()
) -> tuple[Curve, Weights]:
    """The same steps by torch alone: one process, one backward pass over the mean of the full batch.

    model: the model to train, such as one with adapters; None takes transformers' own with all weights trained.
    skipped: steps that are not made.
    """
    prompts = VoxtralPrompts.from_pretrained(config.model.path)
    loader = build_train_loader(config.train_data, prompts, config.seed, NUM_STEPS, 0, 1)
    model = model or whole_model(config)
    log_mel = LogMel.from_pretrained(config.model.path, torch.device("cpu"))
    settings = config.optimizer
    optimizer = torch.optim.AdamW(parameter_groups(model, settings), betas=settings.betas, eps=settings.epsilon)
    trained = {f"{name}//ema": one for name, one in model.named_parameters() if one.requires_grad}
    averages = {name: one.detach().double() for name, one in trained.items()} if settings.ema_decay else {}
    curve = []
    for batches in loader.starting_at(0):
        if batches.step in skipped:
            continue
        losses = []
        for batch in batches.micro_batches:
            logits = model(
                input_ids=batch.input_ids,
                attention_mask=real_positions(batch),
                input_features=log_mel(batch.pcm, batch.windows_per_example),
                use_cache=False,
            ).logits
            smoothing = config.model.label_smoothing
            labels = batch.labels.flatten()
            each = F.cross_entropy(logits.flatten(0, 1), labels, reduction="none", label_smoothing=smoothing)
            losses.append(each[labels != IGNORED_LABEL])
        loss = torch.cat(losses).mean()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, batches.step, config.num_steps)
        optimizer.step()
        for name, average in averages.items():
            averages[name] = settings.ema_decay * average + (1 - settings.ema_decay) * trained[name].detach().double()
        optimizer.zero_grad()
        curve.append((loss.item(), grad_norm.item()))
    return curve, {name: parameter.detach() for name, parameter in model.named_parameters()} | averages


def real_positions(batch: MicroBatch) -> Tensor:
    """The attention mask that transformers' own collators make, `(B, T)`: 1 where there is no padding."""
    lengths = torch.tensor(batch.positions_per_example)
    return (torch.arange(batch.input_ids.shape[1]) < lengths[:, None]).long()


def whole_model(config: RunConfig) -> VoxtralForConditionalGeneration:
    """transformers' own model with all weights trained."""
    model = VoxtralForConditionalGeneration.from_pretrained(config.model.path, dtype=torch.float32).train()
    # Whisper's sinusoids: the class freezes them, but loading unfreezes them.
    model.model.audio_tower.embed_positions.requires_grad_(False)
    return model


def assert_same(actual: tuple[Curve, Weights], expected: tuple[Curve, Weights], variant: str = "") -> None:
    assert torch.tensor(actual[0]) == pytest.approx(torch.tensor(expected[0]), rel=2e-5), variant
    assert actual[1].keys() == expected[1].keys(), variant
    for name, weight in expected[1].items():
        difference = float((actual[1][name] - weight).abs().max())
        assert difference < 2e-6, f"{name} differs by {difference} {variant}"


def train_all(world: World, configs: list[RunConfig]) -> list[tuple[Curve, Weights]]:
    """One run after the other in the same ranks, because imports take longer than training."""
    results = []
    for config in configs:
        results.append(train_sharded(world, config))
        # The hooks of engines form reference cycles.
        gc.collect()
    return results


def assert_equal_plain(world_size: int, runs: dict[str, RunConfig]) -> None:
    """Each run gives the same on every rank as one plain process on the full batch."""
    of_ranks = run_ranks(world_size, train_all, list(runs.values()))
    for number, (name, run) in enumerate(runs.items()):
        has_all = run.trainable == TrainableConfig()
        expected = train_plainly(run, None if has_all else load_voxtral(run.model, run.trainable, run.seed))
        for results in of_ranks:
            assert_same(results[number], expected, name)


@pytest.fixture(scope="module")
def config(tiny_model: Path, shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    # 5 slots do not divide evenly over 2 or 3 ranks, so one rank runs a micro-batch of weight zero.
    run = run_config(tmp_path_factory.mktemp("run"), tiny_model, shard_folder, num_steps=NUM_STEPS, slots_per_step=5)
    return with_averages(run)


def with_averages(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"ema_decay": 0.7})})


def test_target_counts_are_uneven(config: RunConfig) -> None:
    prompts = VoxtralPrompts.from_pretrained(config.model.path)
    loader = build_train_loader(config.train_data, prompts, config.seed, 1, 0, 1)
    counts = [batch.num_target_tokens for batch in next(iter(loader.starting_at(0))).micro_batches]
    assert len(set(counts)) > 1


CHECKPOINTED = {"activation_checkpointing": {"encoder": 1, "language_model": 2}, "loss_chunk_tokens": 3}
SMOOTHED = {"label_smoothing": 0.1}
# Two windows and 40 positions at a time: micro-batches have one to eight windows, and differ between ranks.
IN_CHUNKS = {"encoder_windows_per_chunk": 2, "mlp_chunk_tokens": 40}
OFFLOADED = CHECKPOINTED | {"activation_offloading": True}
# By default ZeRO-3 does not shard small parameters, and those of this model are small.
ALL_SHARDED = {"stage3_param_persistence_threshold": 0}
# Of gradients, each to the rank that updates it, in place of all-reduces.
REDUCTIONS = {"use_multi_rank_bucket_allreduce": False, "overlap_comm": False}
ADAPTERS = {"lora": {"rank": 4}}
DORA = {"lora": {"rank": 4, "use_dora": True, "trained_whole": ["encoder"]}, "frozen": ["projector"]}

# By number of ranks and name: the stage, more settings of DeepSpeed, of section `model`, and of section `trainable`.
VARIANTS: dict[tuple[int, str], tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    (1, "stage 1 in chunks"): (1, {}, IN_CHUNKS, {}),
    (1, "stage 2 with smoothed labels"): (2, {}, SMOOTHED, {}),
    (1, "stage 3"): (3, {}, {}, {}),
    (2, "stage 0"): (0, {}, {}, {}),
    (2, "stage 1 with a frozen encoder"): (1, {}, {}, {"frozen": ["encoder"]}),
    (2, "stage 2 in chunks and offloaded"): (2, {}, IN_CHUNKS | OFFLOADED, {}),
    (2, "stage 3 with everything sharded and smoothed labels"): (3, ALL_SHARDED, CHECKPOINTED | SMOOTHED, {}),
    (2, "stage 3 with DoRA and a trained encoder"): (3, ALL_SHARDED, IN_CHUNKS | OFFLOADED, DORA),
    (3, "stage 2"): (2, {}, {}, {}),
    (3, "stage 1 with reductions"): (1, REDUCTIONS, {}, {}),
    (3, "stage 2 with adapters"): (2, {}, {}, ADAPTERS),
    (3, "stage 2 with reductions"): (2, REDUCTIONS, {}, {}),
    (3, "stage 3 in chunks"): (3, ALL_SHARDED, IN_CHUNKS, {}),
    (3, "stage 3 in chunks and offloaded"): (3, {}, IN_CHUNKS | OFFLOADED, {}),
    (3, "stage 3 with adapters"): (3, {}, {}, ADAPTERS),
}


def variant(config: RunConfig, key: tuple[int, str], folder: Path) -> RunConfig:
    stage, zero, model, trainable = VARIANTS[key]
    settings = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text())
    settings["zero_optimization"] |= zero
    file = folder / f"{key[1].replace(' ', '-')}.json"
    file.write_text(json.dumps(settings))
    tree = config.model_dump()
    changed = {"engine": {"deepspeed": file}, "model": tree["model"] | model, "trainable": trainable}
    return RunConfig.model_validate(tree | changed)


@pytest.mark.parametrize(
    "world_size", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_zero_equals_one_plain_process(config: RunConfig, world_size: int, tmp_path: Path) -> None:
    keys = [key for key in VARIANTS if key[0] == world_size]
    assert_equal_plain(world_size, {key[1]: variant(config, key, tmp_path) for key in keys})


@pytest.mark.parametrize(("size", "chunk_size"), [("num_windows", 2), ("num_positions", 40)])
def test_ranks_have_unequal_numbers_of_chunks(config: RunConfig, size: str, chunk_size: int) -> None:
    prompts = VoxtralPrompts.from_pretrained(config.model.path)
    loaders = [build_train_loader(config.train_data, prompts, config.seed, 1, rank, 3) for rank in range(3)]
    steps = [next(iter(loader.starting_at(0))).micro_batches for loader in loaders]
    sizes = [
        [batch.num_windows if size == "num_windows" else batch.input_ids.numel() for batch in micro_batches]
        for micro_batches in steps
    ]
    assert any(len({-(-count // chunk_size) for count in together}) > 1 for together in zip(*sizes, strict=True))
