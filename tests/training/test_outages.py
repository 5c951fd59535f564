"""A storage that fails while a run trains: nothing is skipped for it, and the same command resumes."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from voxtral_dist.config import RunConfig
from voxtral_dist.distributed.world import World
from voxtral_dist.errors import UserError
from voxtral_dist.train import train
from voxtral_dist.training.metrics_file import read_metrics

from ranks import run_ranks
from runs import run_config

NUM_STEPS = 6


def train_on_failing_disk(world: World, config: RunConfig, num_reads: int | None) -> tuple[int, str]:
    """Train; the disk of rank 1 fails after some reads of utterances, for good."""
    from voxtral_dist.data.stored.storage import local

    read_once, left = local._read_once, iter(range(num_reads or 10**9))

    def failing(span: local.Span) -> bytes:
        if world.rank == 1 and next(left, None) is None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_once(span)

    local._read_once = failing
    try:
        return train(config, world), ""
    except UserError as error:
        return error.exit_code, str(error)


def test_a_disk_that_fails_ends_a_run_after_a_save_and_costs_no_utterance(
    tiny_model: Path, shard_folder: Path, tmp_path: Path
) -> None:
    config = run_config(
        tmp_path / "run",
        tiny_model,
        shard_folder,
        num_steps=NUM_STEPS,
        stage=2,
        checkpoint={"every_steps": 100},
        export={"layouts": []},
        metrics={"tensorboard": False},
    )
    # Two micro-batches of one or two utterances a step, which are read one step ahead.
    first, second = run_ranks(2, train_on_failing_disk, config, 10)
    assert first == second
    code, sentence = first
    assert code == 74
    stopped = re.match(
        r"Stopped at step ([2-4]), which is saved: .*tar cannot be read: Input/output error\. ", sentence
    )
    assert stopped is not None, sentence
    assert "Its storage fails, and not one utterance, so none is skipped" in sentence
    assert [path.name for path in (config.run_dir / "checkpoints").glob("step-*")] == [f"step-000000{stopped[1]}"]
    assert run_ranks(2, train_on_failing_disk, config, None) == [(0, ""), (0, "")]
    rows = read_metrics(config.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, NUM_STEPS + 1))
    assert not [row for row in rows if row.get("event") == "bad_utterance"]
