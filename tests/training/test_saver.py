"""Checkpoints that a thread writes while training goes on, and when they are begun and completed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch
from torch import Tensor

from voxtral_dist.checkpoints.directory import CheckpointDirectory, latest_step, newest_intact_step
from voxtral_dist.checkpoints.files import WrittenPart
from voxtral_dist.checkpoints.progress import TrainProgress
from voxtral_dist.checkpoints.save_under_way import SaveUnderWay
from voxtral_dist.checkpoints.uploads import UploadEvent
from voxtral_dist.config import CheckpointConfig, RunConfig
from voxtral_dist.distributed.collectives import wait_for_all
from voxtral_dist.distributed.world import World, alone
from voxtral_dist.errors import UserError, WriteError
from voxtral_dist.training import saver as saver_module
from voxtral_dist.training.bad_utterances import BadUtteranceLimits
from voxtral_dist.training.metrics_log import MetricsLog
from voxtral_dist.training.requests import Requests
from voxtral_dist.training.saver import Saver
from voxtral_dist.training.step import StepResult
from voxtral_dist.training.time_limit import TimeLimit

from ranks import run_ranks
from runs import run_config
from states import SHAPES, PartitionedStates, WholeStates, files_limited_to

CPU = alone("cpu")


class TrainedPartitions(PartitionedStates):
    """Weights that stay where they are, and change."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.weights = {name: torch.zeros(shape) for name, shape in SHAPES.items()}

    def train(self, value: float) -> None:
        for weight in self.weights.values():
            weight.fill_(value)

    def partitions(self) -> dict[str, Tensor]:
        return self.weights


class TrainedWhole(WholeStates):
    """The same, of which each rank writes whole parameters."""

    def train(self, value: float) -> None:
        self.value = value


LAYOUTS: dict[str, Any] = {"whole": TrainedWhole, "dcp": TrainedPartitions}


@pytest.fixture
def config(tiny_model: Path, shard_folder: Path, tmp_path: Path) -> RunConfig:
    return run_config(tmp_path, tiny_model, shard_folder, num_steps=9)


@contextmanager
def writing_late() -> Iterator[threading.Event]:
    """Let threads that start in the block write no earlier than the event is set."""
    may_write = threading.Event()
    write = SaveUnderWay._write

    def write_late(self: SaveUnderWay, *arguments: Any) -> None:
        may_write.wait()
        write(self, *arguments)

    SaveUnderWay._write = write_late  # type: ignore[method-assign]
    try:
        yield may_write
    finally:
        SaveUnderWay._write = write  # type: ignore[method-assign]


def saved_while_training(world: World, config: RunConfig, layout: str) -> tuple[bool, int | None, int | None, Any]:
    """Whether the thread had ended before weights changed, what could be resumed before and after, and its weights."""
    engine = LAYOUTS[layout](world)
    engine.train(3.0)
    directory = CheckpointDirectory(config, "", world)
    with writing_late() as may_write:
        directory.start(engine, TrainProgress(step=3), in_background=True)
    engine.train(4.0)
    before = directory.is_written, latest_step(config.run_dir, world)
    may_write.set()
    directory.finish()
    step = latest_step(config.run_dir, world)
    directory.load(engine, step)
    return *before, step, engine.loaded


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_thread_writes_the_state_of_the_moment_of_the_copy(config: RunConfig, layout: str) -> None:
    expected = (False, None, 3, {"a": 3.0, "b": 3.0, "c": 3.0})
    assert run_ranks(2, saved_while_training, config, layout) == [expected, expected]


def failing_on_rank_1(world: World, config: RunConfig, layout: str) -> tuple[int, str]:
    directory = CheckpointDirectory(config, "", world)
    with files_limited_to(100_000 if world.rank == 1 else 10**9):
        directory.start(LAYOUTS[layout](world), TrainProgress(step=1), in_background=True)
        with pytest.raises(UserError) as refused:
            directory.finish()
    assert not directory.is_under_way
    return refused.value.exit_code, str(refused.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_thread_that_cannot_write_ends_all_ranks(config: RunConfig, layout: str) -> None:
    refusals = run_ranks(2, failing_on_rank_1, config, layout)
    assert refusals[0] == refusals[1]
    assert refusals[0][0] == 74
    assert "step-0000001 cannot be written: " in refusals[0][1]
    assert list((config.run_dir / "checkpoints").iterdir()) == []


def left_by_rank_0(world: World, config: RunConfig, layout: str, error: Exception) -> tuple[int | None, int | None]:
    """Rank 0 leaves alone while a checkpoint is under way, and rank 1 waits for it in a collective."""
    directory = CheckpointDirectory(config, "", world)
    with writing_late() as may_write:
        directory.start(LAYOUTS[layout](world), TrainProgress(step=3), in_background=True)
    threading.Timer(0.3, may_write.set).start()
    found = None
    if world.is_first:
        with MetricsLog(config.run_dir, 9, 0, alone("cpu")) as log:
            arguments = config.checkpoint, directory, LAYOUTS[layout](world), log, TimeLimit(None), world
            Saver(*arguments).outlast(type(error), error, None)
        found = newest_intact_step(config.run_dir)
    wait_for_all(world)
    directory.finish()
    return found, newest_intact_step(config.run_dir)


@pytest.mark.parametrize(
    ("layout", "failure"),
    [
        ("whole", WriteError("The metrics cannot be written.")),
        ("dcp", RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")),
    ],
)
def test_a_rank_that_fails_alone_waits_for_the_checkpoint_under_way(
    config: RunConfig, layout: str, failure: Exception
) -> None:
    assert run_ranks(2, left_by_rank_0, config, layout, failure) == [(3, 3), (None, 3)]


def test_a_rank_whose_collective_fails_waits_for_no_other(config: RunConfig) -> None:
    assert run_ranks(2, left_by_rank_0, config, "whole", RuntimeError("Connection closed by peer"))[0] == (None, 3)


@pytest.mark.parametrize("fails", ["writing", "completing"])
def test_a_thread_that_ends_by_an_error_keeps_nobody_waiting(config: RunConfig, fails: str) -> None:
    class Held:
        def write(self) -> WrittenPart:
            return {}["gone"] if fails == "writing" else WrittenPart()  # type: ignore[no-any-return, index]

    def complete(parts: Sequence[WrittenPart]) -> str | None:
        return parts[0].failure if fails == "writing" else {}["gone"]

    save = SaveUnderWay(config.run_dir, config.run_dir, Held(), TrainProgress(), {}, {})  # type: ignore[arg-type]
    save.write_in_background(CPU, complete)
    assert not save.is_complete_within(1000.0)
    with pytest.raises(KeyError, match="gone"):
        save.wait()


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def taking(clock: Clock, seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*arguments: Any, **options: Any) -> Any:
        clock.seconds += seconds
        return function(*arguments, **options)

    return timed


class Run:
    """A saver by a clock: a copy takes 2 s, completing 1 s, and a save that is waited for 30 s."""

    def __init__(self, config: RunConfig, metrics_log: MetricsLog, uploads: Any = None, **settings: Any) -> None:
        self.clock = Clock()
        self.time_limit = TimeLimit(None, self.clock)
        self.directory = CheckpointDirectory(config, "", CPU)
        start, finish = self.directory.start, self.directory.finish
        self.directory.save = taking(self.clock, 30, self.directory.save)  # type: ignore[method-assign]
        self.directory.start = self._start(start)  # type: ignore[method-assign]
        self.directory.finish = self._finish(finish)  # type: ignore[method-assign]
        self.saver = Saver(
            CheckpointConfig(**settings),
            self.directory,
            WholeStates(CPU),
            metrics_log,
            self.time_limit,
            CPU,
            self.clock,
            uploads,
        )

    def _start(self, start: Callable[..., Any]) -> Callable[..., Any]:
        return taking(self.clock, 2, start)

    def _finish(self, finish: Callable[..., Any]) -> Callable[..., Any]:
        return taking(self.clock, 1, finish)

    def step(self, number: int, agreed: Requests | None = None, *, is_awaited: bool = False) -> None:
        self.clock.seconds += 10
        self.saver.after_step(TrainProgress(step=number), agreed or Requests(), is_awaited=is_awaited)


@pytest.fixture
def metrics_log(tmp_path: Path) -> Iterator[MetricsLog]:
    with MetricsLog(tmp_path, 9, 0, CPU) as log:
        yield log


def test_a_save_by_steps_stalls_for_copy_and_completion_only(config: RunConfig, metrics_log: MetricsLog) -> None:
    run = Run(config, metrics_log, every_steps=2, asynchronous=True)
    run.step(1)
    run.step(2)
    assert run.directory.is_under_way
    run.step(3, Requests(is_written=True))
    assert not run.directory.is_under_way
    # The next one is not written when another is due, and the last one is waited for.
    run.step(4)
    run.step(6)
    run.step(7, is_awaited=True)
    rows = [(row["step"], row["seconds"], row["stalled_seconds"]) for row in metrics_log.rows("checkpoint")]
    assert rows[:3] == [(2, 13, 3), (4, 13, 3), (6, 13, 3)]
    assert rows[3][0] == 7
    # A run that ends by an error loses no checkpoint under way.
    run.step(8)
    assert run.directory.is_under_way
    assert run.saver.newest() == "step-0000008"
    assert rows[3][1] == rows[3][2] >= 30
    assert run.directory.intact_steps() == [7, 8]


def test_a_run_that_ends_by_a_limit_completes_the_save_under_way(config: RunConfig, metrics_log: MetricsLog) -> None:
    run = Run(config, metrics_log, every_steps=2, asynchronous=True)
    limits = BadUtteranceLimits(
        config.train_data.model_copy(update={"max_bad_in_a_row": 2}), metrics_log, CPU, run.saver.newest
    )
    skipped = StepResult(metrics=ANY, num_utterances=0, num_bad_utterances=2, num_too_long=0, agreed=Requests())
    run.step(2)
    limits.check(TrainProgress(step=3), [], skipped)
    assert run.directory.is_under_way
    with pytest.raises(
        UserError, match=r"`train_data\.max_bad_in_a_row` \(2\).*The newest checkpoint is step-0000002\."
    ):
        limits.check(TrainProgress(step=4), [], skipped)
    assert run.directory.intact_steps() == [2]


def test_seconds_begin_a_save_too(config: RunConfig, metrics_log: MetricsLog) -> None:
    run = Run(config, metrics_log, every_seconds=25, asynchronous=True)
    for number, expected in enumerate([False, False, True, False, False, True], 1):
        run.clock.seconds += 10
        is_time = run.saver.is_time()
        assert is_time is expected, number
        agreed = Requests(save_in_background=is_time)
        run.clock.seconds -= 10
        run.step(number, agreed)


def test_without_memory_for_a_copy_a_save_is_waited_for(
    config: RunConfig, metrics_log: MetricsLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(config, metrics_log, every_steps=1)
    run.step(1)
    assert run.directory.is_under_way
    monkeypatch.setattr(saver_module, "free_memory_bytes", lambda *_: 1000)
    run.step(2)
    assert not run.directory.is_under_way
    assert run.directory.intact_steps() == [1, 2]


class FinishedUploads:
    """Uploads of which each has ended before the next step."""

    def __init__(self) -> None:
        self._steps: list[int] = []

    def steps_in_use(self) -> list[int]:
        return self._steps

    def offer(self, step: int, folder: Path, kept_step: int | None) -> None:
        self._steps.append(step)

    def events(self) -> list[UploadEvent]:
        steps, self._steps = self._steps, []
        return [UploadEvent(step, {"event": "uploaded", "path": "", "seconds": 50.0 * step}, None) for step in steps]


def test_the_time_of_an_upload_is_kept_for_the_limit_of_the_run(config: RunConfig, metrics_log: MetricsLog) -> None:
    run = Run(config, metrics_log, FinishedUploads(), every_steps=100, asynchronous=True)
    assert run.saver.owed_uploads() == ("upload",)
    run.step(1, is_awaited=True)
    assert run.saver.owed_uploads() == ("upload", "upload"), "a stop waits for the one under way, too"
    run.step(2)
    assert run.saver.owed_uploads() == ("upload",)
    assert run.time_limit.last("upload") == 50
    assert Run(config, metrics_log).saver.owed_uploads() == ()
