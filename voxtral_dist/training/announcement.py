"""What a run records and says before its first step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from voxtral_dist.checkpoints.changes import Change
from voxtral_dist.checkpoints.progress import TrainProgress
from voxtral_dist.config import RunConfig, dump_config
from voxtral_dist.data.loader import TrainLoader
from voxtral_dist.data.training_set import TrainingSet
from voxtral_dist.distributed.devices import device_name
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.build import engine_name
from voxtral_dist.files import write_atomically, write_errors_named
from voxtral_dist.model.attention import chosen_attention
from voxtral_dist.output.counting import counted
from voxtral_dist.training.memory_limits import MemoryLimits
from voxtral_dist.training.metrics_log import MetricsLog
from voxtral_dist.training.versions import package_versions

# Published fine-tunings take 1 to 10 epochs; far beyond that, transcripts of the training set are learned by heart.
MANY_EPOCHS = 20


def announce(
    config: RunConfig,
    loader: TrainLoader,
    progress: TrainProgress,
    changes: Sequence[Change],
    notes: Sequence[str],
    world: World,
    metrics_log: MetricsLog,
) -> None:
    """Store the configuration, record the start, and print what is about to be trained on what.

    Args:
        config: of the run.
        loader: of its data.
        progress: from which it goes on.
        changes: since the checkpoint from which it resumes.
        notes: further lines, such as a table of parameters.
        world: all ranks.
        metrics_log: where it is recorded.
    """
    if world.is_first:
        with write_errors_named("The configuration", config.run_dir):
            write_atomically(config.run_dir / "config.yaml", dump_config(config))
    metrics_log.write("event", progress.step, _event(config, loader, progress, world))
    for change in changes:
        metrics_log.say(f"Changed since step {progress.step}: {change}")
        metrics_log.write("event", progress.step, {"event": "changed", **asdict(change)})
    for line in [*data_lines(config, loader, world.size), *notes]:
        metrics_log.say(line)


def announce_limits(limits: MemoryLimits, progress: TrainProgress, metrics_log: MetricsLog) -> None:
    """Say and record, once, that micro-batches are divided, where memory has run out before."""
    if limits.exceeded:
        metrics_log.say(str(limits))
        metrics_log.write("event", progress.step, {"event": "divided", **asdict(limits.exceeded[-1])})


def data_lines(config: RunConfig, loader: TrainLoader, num_ranks: int) -> Iterator[str]:
    """What a run is trained on, how much of it a step takes, and whether it is seen too often."""
    yield from loader.training_set.lines()
    yield batch_line(config.train_data.slots_per_step, loader.training_set, num_ranks)
    num_epochs = _num_epochs(loader)
    if num_epochs > MANY_EPOCHS:
        yield (
            f"Warning: {counted(num_epochs, 'epoch', '.0f')}, more than {MANY_EPOCHS}: models learn utterances that "
            "they see so often by heart. Look at the error rate on a development set (`evaluation.every_steps`), keep "
            "the best checkpoint (`evaluation.selection`), or lower `num_steps`."
        )


def batch_line(num_slots: int, training_set: TrainingSet, num_ranks: int) -> str:
    """The batch size of a step: micro-batch x accumulation x ranks."""
    each = training_set.plan.statistics.num_utterances
    accumulated = f"{num_slots // num_ranks}"
    if num_slots % num_ranks:
        accumulated = f"{num_slots // num_ranks} or {num_slots // num_ranks + 1}"
    return (
        f"batch size: about {counted(each * num_slots, 'utterance', '.0f')} a step, {each:.1f} in a micro-batch x "
        f"{accumulated} accumulated x {counted(num_ranks, 'rank')} (`train_data.slots_per_step: {num_slots}`)"
    )


def training_line(config: RunConfig, loader: TrainLoader, first_step: int, world: World) -> str:
    """The run in one line; `config` has values in the place of `auto`."""
    start = f"from step {first_step} " if first_step else ""
    model, utterances = config.model, loader.training_set.streams.num_utterances
    return (
        f"Training {start}for {counted(loader.num_steps, 'step')} ({counted(_num_epochs(loader), 'epoch', '.4g')}) on "
        f"{counted(utterances, 'utterance')}, {counted(world.size, 'rank')}, {engine_name(config.engine)}, "
        f"{world.device.type}, {model.precision}, "
        f"{chosen_attention(model)} attention{', compiled blocks' if model.compile_blocks else ''}"
    )


def _num_epochs(loader: TrainLoader) -> float:
    return loader.num_steps / loader.training_set.plan.steps_per_epoch


def _event(config: RunConfig, loader: TrainLoader, progress: TrainProgress, world: World) -> dict[str, Any]:
    training_set = loader.training_set
    event: dict[str, Any] = {
        "event": "resumed" if progress.step else "started",
        "world_size": world.size,
        "num_steps": loader.num_steps,
        "num_epochs": round(_num_epochs(loader), 4),
        "num_utterances": len(training_set.index),
        "skipped": training_set.streams.skipped,
        "engine": engine_name(config.engine),
        "device": device_name(world.device),
        "versions": package_versions(),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if world.is_first:
        event["audio_seconds"] = training_set.streams.seconds_by_language(training_set.index)
    return event
