"""Every ZeRO stage on any number of ranks trains as one plain process does on the whole batch, in float32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import VoxtralForConditionalGeneration

from voxtral_dist.config import ActivationCheckpointingConfig, RunConfig
from voxtral_dist.data.batches import IGNORED_LABEL
from voxtral_dist.data.features import LogMel
from voxtral_dist.data.loader import build_train_loader
from voxtral_dist.data.prompts import VoxtralPrompts
from voxtral_dist.distributed.world import World
from voxtral_dist.optim import learning_rate, parameter_groups

from ranks import run_ranks
from runs import run_config

NUM_STEPS = 5
Curve = list[tuple[float, float]]
Weights = dict[str, torch.Tensor]


def train_sharded(world: World, config: RunConfig) -> tuple[Curve, Weights]:
    """(loss, gradient norm) of every step, and the weights at the end."""
    from voxtral_dist.engine.build import build_engine
    from voxtral_dist.train import train_step

    prompts = VoxtralPrompts.from_pretrained(config.model.path)
    loader = build_train_loader(config.train_data, prompts, config.seed, NUM_STEPS, world.rank, world.size)
    engine = build_engine(config, LogMel.from_pretrained(config.model.path, world.device), world)
    curve = []
    for batches in loader.starting_at(0):
        metrics = train_step(config, engine, batches, False, world).metrics
        curve.append((metrics.loss, metrics.grad_norm))
    return curve, dict(engine.weights())


def train_plainly(config: RunConfig, model: VoxtralForConditionalGeneration | None = None) -> tuple[Curve, Weights]:
    """The same steps by torch alone: one process, one backward pass over the mean of the whole batch.

    model: another one than that of the library with all weights trained, such as one with adapters.
    """
    prompts = VoxtralPrompts.from_pretrained(config.model.path)
    loader = build_train_loader(config.train_data, prompts, config.seed, NUM_STEPS, 0, 1)
    model = model or whole_model(config)
    log_mel = LogMel.from_pretrained(config.model.path, torch.device("cpu"))
    settings = config.optimizer
    optimizer = torch.optim.AdamW(parameter_groups(model, settings), betas=settings.betas, eps=settings.epsilon)
    curve = []
    for batches in loader.starting_at(0):
        losses = []
        for batch in batches.micro_batches:
            logits = model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                input_features=log_mel(batch.pcm, batch.windows_per_example),
            ).logits[:, -batch.labels.shape[1] :]
            each = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
            losses.append(each[batch.labels.flatten() != IGNORED_LABEL])
        loss = torch.cat(losses).mean()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, batches.step, config.num_steps)
        optimizer.step()
        optimizer.zero_grad()
        curve.append((loss.item(), grad_norm.item()))
    return curve, {name: parameter.detach() for name, parameter in model.named_parameters()}


def whole_model(config: RunConfig) -> VoxtralForConditionalGeneration:
    """The library's own model with all weights trained."""
    model = VoxtralForConditionalGeneration.from_pretrained(config.model.path, dtype=torch.float32).train()
    # Whisper's sinusoids: the class freezes them, and loading forgets that.
    model.model.audio_tower.embed_positions.requires_grad_(False)
    return model


def assert_same(actual: tuple[Curve, Weights], expected: tuple[Curve, Weights], variant: str = "") -> None:
    assert torch.tensor(actual[0]) == pytest.approx(torch.tensor(expected[0]), rel=2e-5), variant
    assert actual[1].keys() == expected[1].keys(), variant
    for name, weight in expected[1].items():
        difference = float((actual[1][name] - weight).abs().max())
        assert difference < 2e-6, f"{name} differs by {difference} {variant}"


@pytest.fixture(scope="module")
def config(tiny_model: Path, shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    # 5 slots: 2 and 3 ranks have unequal shares, so that one of them runs a micro-batch of weight zero.
    return run_config(tmp_path_factory.mktemp("run"), tiny_model, shard_folder, num_steps=NUM_STEPS, slots_per_step=5)


@pytest.fixture(scope="module")
def plain(config: RunConfig) -> tuple[Curve, Weights]:
    return train_plainly(config)


def test_target_counts_are_uneven(config: RunConfig) -> None:
    prompts = VoxtralPrompts.from_pretrained(config.model.path)
    loader = build_train_loader(config.train_data, prompts, config.seed, 1, 0, 1)
    counts = [batch.num_targets for batch in next(iter(loader.starting_at(0))).micro_batches]
    assert len(set(counts)) > 1


def test_weights_that_are_never_kept_whole_equal_one_plain_process(
    config: RunConfig, plain: tuple[Curve, Weights], tmp_path: Path
) -> None:
    # Small parameters are usually not sharded, and those of this model are small.
    settings = json.loads(config.engine.deepspeed.read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    file = tmp_path / "zero3.json"
    file.write_text(json.dumps(settings))
    checkpointing = ActivationCheckpointingConfig(encoder=1, language_model=2)
    model = config.model.model_copy(update={"activation_checkpointing": checkpointing, "loss_chunk_tokens": 3})
    sharded = config.model_copy(update={"engine": config.engine.model_copy(update={"deepspeed": file}), "model": model})
    for result in run_ranks(2, train_sharded, sharded):
        assert_same(result, plain)


@pytest.mark.parametrize(("stage", "world_size"), [(0, 2), (1, 2), (2, 2), (3, 2), (3, 1), (3, 3)])
def test_zero_equals_one_plain_process(
    config: RunConfig, plain: tuple[Curve, Weights], stage: int, world_size: int
) -> None:
    staged = config.model_copy(update={"engine": config.engine.model_copy(update={"deepspeed": _file_of(stage)})})
    for result in run_ranks(world_size, train_sharded, staged):
        assert_same(result, plain)


@pytest.mark.parametrize(("stage", "world_size"), [(1, 1), (2, 2), (3, 2), (3, 3)])
def test_passes_of_the_encoder_equal_one_plain_process(
    config: RunConfig, plain: tuple[Curve, Weights], stage: int, world_size: int
) -> None:
    # Two windows at a time: micro-batches have one to eight, and differ between ranks, down to a silent one.
    passes = config.model.model_copy(update={"encoder_windows_per_pass": 2})
    engine = config.engine.model_copy(update={"deepspeed": _file_of(stage)})
    staged = config.model_copy(update={"engine": engine, "model": passes})
    for result in run_ranks(world_size, train_sharded, staged):
        assert_same(result, plain)


def test_ranks_have_unequal_numbers_of_windows(config: RunConfig) -> None:
    prompts = VoxtralPrompts.from_pretrained(config.model.path)
    loaders = [build_train_loader(config.train_data, prompts, config.seed, 1, rank, 3) for rank in range(3)]
    steps = [next(iter(loader.starting_at(0))).micro_batches for loader in loaders]
    windows = [[batch.num_windows for batch in micro_batches] for micro_batches in steps]
    assert any(len({-(-count // 2) for count in together}) > 1 for together in zip(*windows, strict=True))


def _file_of(stage: int) -> Path:
    return Path(__file__).resolve().parents[2] / "ds_configs" / f"zero{stage}.json"
