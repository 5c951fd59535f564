"""A disk that is full, or a `run_dir` that is gone, in each phase of a run: one sentence, code 74, and nothing lost."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from voxtral_dist.config import EngineConfig, Fsdp2Config, RunConfig
from voxtral_dist.distributed.world import World
from voxtral_dist.errors import UserError
from voxtral_dist.train import train
from voxtral_dist.training.metrics_file import read_metrics

from ranks import run_ranks
from runs import run_config
from states import files_limited_to

NUM_STEPS = 4


def wait_until_complete(checkpoint: Path) -> None:
    deadline = time.monotonic() + 60
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def train_with_fault(world: World, config: RunConfig, phase: str, fault: str) -> tuple[int, str]:
    """Train; the fault happens once, in the middle of a phase."""
    from voxtral_dist import train as run
    from voxtral_dist.checkpoints import directory
    from voxtral_dist.training.evaluator import Evaluator
    from voxtral_dist.training.metrics_log import MetricsLog

    saved_before = iter([False, True])
    owner, name, is_now = {
        "stepping": (MetricsLog, "train_step", lambda _, step, *__: step == 3),
        "saving": (directory, "hold_states", lambda *_: next(saved_before, False)),
        "evaluating": (Evaluator, "evaluate", lambda _, step, *__: step == NUM_STEPS),
        "exporting": (run, "export_trained", lambda *_: True),
    }[phase]
    function, limit = getattr(owner, name), files_limited_to(1000)

    def faulty(*arguments: Any, **options: Any) -> Any:
        if is_now(*arguments):
            # A disk without room has none for a checkpoint that is under way either.
            wait_until_complete(config.run_dir / "checkpoints" / "step-0000002")
            shutil.rmtree(config.run_dir) if fault == "gone" else limit.__enter__()
        return function(*arguments, **options)

    setattr(owner, name, faulty)
    try:
        return train(config, world), ""
    except UserError as error:
        return error.exit_code, str(error)
    finally:
        if fault == "full":
            limit.__exit__(None, None, None)


def train_again(world: World, config: RunConfig) -> int:
    return train(config, world)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["full", "gone"])
@pytest.mark.parametrize("phase", ["stepping", "saving", "evaluating", "exporting"])
@pytest.mark.parametrize("engine", ["zero", "fsdp2"])
def test_a_fault_of_the_disk_ends_a_run_with_a_sentence_and_loses_nothing(
    engine: str, phase: str, fault: str, tiny_model: Path, shard_folder: Path, tmp_path: Path
) -> None:
    config = run_config(
        tmp_path / "run",
        tiny_model,
        shard_folder,
        num_steps=NUM_STEPS,
        stage=2,
        checkpoint={"every_steps": 2},
        evaluation={"test_sets": {"same": {"shards": str(shard_folder), "max_utterances": 3}}, "at_start": False},
        metrics={"tensorboard": False},
    )
    if engine == "fsdp2":
        config = config.model_copy(update={"engine": EngineConfig(fsdp2=Fsdp2Config())})
    ((code, sentence),) = run_ranks(1, train_with_fault, config, phase, fault)
    assert code == 74, sentence
    assert "cannot be written" in sentence
    if fault == "gone":
        assert not (config.run_dir / "checkpoints").exists()
        return
    assert run_ranks(1, train_again, config) == [0]
    rows = read_metrics(config.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, NUM_STEPS + 1))
    resumed = [row["step"] for row in rows if row.get("event") == "resumed"]
    assert resumed == [NUM_STEPS if phase in ("evaluating", "exporting") else 2]
