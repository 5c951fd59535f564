"""The whole matrix of resumed runs: each engine on 1, 2 and 3 ranks goes on from the checkpoint of each of them.

A part of it is among the fast tests of `test_checkpoint.py`.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from voxtral_dist.config import RunConfig
from voxtral_dist.data.loader import build_train_loader
from voxtral_dist.distributed.collectives import gather_on_first
from voxtral_dist.distributed.world import World
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.prompts import VoxtralPrompts

from ranks import run_ranks
from runs import run_config
from test_checkpoint import State, own_states, train_to, with_decay, with_engine

pytestmark = pytest.mark.slow

ENGINES = ("1", "2", "3", "fsdp2")
WORLD_SIZES = (1, 2, 3)
SAVED_STEP, LAST_STEP = 3, 5


@pytest.fixture(scope="module")
def config(tiny_model: Path, shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("matrix")
    return with_decay(run_config(folder, tiny_model, shard_folder, num_steps=LAST_STEP, slots_per_step=3), 0.7)


@pytest.fixture(scope="module")
def unbroken(config: RunConfig) -> State:
    state: State = run_ranks(1, train_to, with_engine(config, "3", config.run_dir / "unbroken"), LAST_STEP)[0]
    return state


@pytest.fixture(scope="module")
def saved(config: RunConfig) -> dict[str, Path]:
    """The folder of a run that stopped half-way, by its engine and its ranks."""
    for world_size in WORLD_SIZES:
        run_ranks(world_size, save_each, config)
    return {name: config.run_dir / name for name in itertools.starmap(name_of, itertools.product(ENGINES, WORLD_SIZES))}


def name_of(engine: str, world_size: int) -> str:
    return f"{engine}-on-{world_size}"


def save_each(world: World, config: RunConfig) -> None:
    for engine in ENGINES:
        train_to(world, with_engine(config, engine, config.run_dir / name_of(engine, world.size)), SAVED_STEP)


def resume_from_each(
    world: World, config: RunConfig, engine_name: str, saved: dict[str, Path], unbroken: State
) -> dict[str, tuple[float, float]]:
    """The largest differences of a loss (relative) and of a weight, moment or average, by the checkpoint.

    One engine loads them all: it has gone on since the last one, so what a checkpoint lacked would be wrong.
    """
    from voxtral_dist.checkpoints.directory import CheckpointDirectory, latest_step
    from voxtral_dist.engine.build import build_engine
    from voxtral_dist.train import build_train_step

    prompts = VoxtralPrompts.from_pretrained(config.model.path)
    loader = build_train_loader(config.train_data, prompts, config.seed, LAST_STEP, world.rank, world.size)
    differences = {}
    engine = None
    for name, run_dir in saved.items():
        run = with_engine(config, engine_name, run_dir)
        engine = engine or build_engine(run, LogMel.from_pretrained(config.model.path, world.device), world)
        checkpoints = CheckpointDirectory(run, loader.training_set.fingerprint, world)
        progress = checkpoints.load(engine, latest_step(run_dir, world))
        assert progress.step == SAVED_STEP
        train_step = build_train_step(run, engine, world)
        losses = [train_step.run(batches).metrics.loss for batches in loader.starting_at(SAVED_STEP)]
        of_ranks = gather_on_first(own_states(engine), world)
        if world.is_first:
            states = {key: tensor for of_rank in of_ranks for key, tensor in of_rank.items()}
            assert states.keys() == unbroken[1].keys()
            differences[name] = (
                max(abs(loss / expected - 1) for loss, expected in zip(losses, unbroken[0][SAVED_STEP:], strict=True)),
                max(float((states[key] - expected).abs().max()) for key, expected in unbroken[1].items()),
            )
    return differences


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_resumes_from_every_checkpoint(
    config: RunConfig, saved: dict[str, Path], unbroken: State, engine: str, world_size: int
) -> None:
    differences = run_ranks(world_size, resume_from_each, config, engine, saved, unbroken)[0]
    assert differences.keys() == saved.keys()
    loss, state = map(max, zip(*differences.values(), strict=True))
    print(f"{name_of(engine, world_size)}: losses within {loss:.2g}, states within {state:.2g}")
    assert loss < 1e-6, differences
    assert state < 2e-6, differences
