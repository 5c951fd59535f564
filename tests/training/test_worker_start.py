"""Data workers are forked before the engine holds weights, and none outlives a run, however it ends."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from voxtral_dist.config import EngineConfig, Fsdp2Config, RunConfig
from voxtral_dist.distributed.world import World
from voxtral_dist.errors import UserError
from voxtral_dist.model.weights import InitialWeights
from voxtral_dist.train import train

from ranks import run_ranks
from runs import run_config

NUM_WORKERS = 2


def num_children() -> int:
    return len(multiprocessing.active_children())


def workers_before_and_after(world: World, config: RunConfig) -> tuple[list[int], int]:
    """Numbers of this rank's workers whenever the engine looks for weights, and after the run."""
    found = []
    locate = InitialWeights.__init__

    def counted(self: InitialWeights, *arguments: Any, **named: Any) -> None:
        found.append(num_children())
        locate(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InitialWeights, "__init__", counted)
        assert train(config, world) == 0
    return found, num_children()


def workers_after_refusal(world: World, config: RunConfig, is_read: bool) -> tuple[str, int]:
    """The message of a run that is refused, and the number of this rank's workers after it."""

    def unreadable(*_: object) -> None:
        assert num_children() == NUM_WORKERS
        raise UserError("the weights cannot be read")

    with pytest.MonkeyPatch.context() as patch:
        if not is_read:
            patch.setattr(InitialWeights, "rows", unreadable)
        with pytest.raises(UserError) as refusal:
            train(config, world)
    # The error is still alive, and with its traceback all that the run had.
    return str(refusal.value), num_children()


@pytest.fixture(scope="module")
def config(tiny_model: Path, shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = run_config(tmp_path_factory.mktemp("runs") / "fsdp2", tiny_model, shard_folder, num_steps=3)
    train_data = config.train_data.model_copy(update={"num_workers": NUM_WORKERS})
    return config.model_copy(update={"train_data": train_data, "engine": EngineConfig(fsdp2=Fsdp2Config())})


@pytest.fixture(scope="module")
def finished(config: RunConfig) -> list[tuple[list[int], int]]:
    """What the ranks of a whole run saw."""
    return run_ranks(2, workers_before_and_after, config)


def test_workers_exist_before_weights_are_read_and_not_after_the_run(
    config: RunConfig, finished: list[tuple[list[int], int]], tiny_model: Path, shard_folder: Path
) -> None:
    assert finished == 2 * [([NUM_WORKERS], 0)]
    zero = run_config(config.run_dir.with_name("zero"), tiny_model, shard_folder, num_steps=3).engine
    sharded_by_deepspeed = config.model_copy(update={"run_dir": config.run_dir.with_name("zero"), "engine": zero})
    assert run_ranks(2, workers_before_and_after, sharded_by_deepspeed) == finished


def test_weights_that_cannot_be_read_leave_no_workers(config: RunConfig) -> None:
    unreadable = config.model_copy(update={"run_dir": config.run_dir.with_name("unreadable")})
    found = run_ranks(2, workers_after_refusal, unreadable, False)
    assert found == [("the weights cannot be read", 0)] * 2


@pytest.mark.usefixtures("finished")
def test_a_refused_checkpoint_leaves_no_workers(config: RunConfig) -> None:
    longer = {"num_steps": 6, "train_data": config.train_data.model_copy(update={"slots_per_step": 5})}
    for message, num_workers in run_ranks(2, workers_after_refusal, config.model_copy(update=longer), True):
        assert "`train_data.slots_per_step` = 4, but it is 5 now" in message
        assert num_workers == 0
