"""The story of a run: from a configuration to checkpoints, word error rates and an exported model."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from voxtral_dist.checkpoints.directory import CheckpointDirectory
from voxtral_dist.checkpoints.progress import TrainProgress
from voxtral_dist.config import RunConfig, TrainDataConfig, dump_config
from voxtral_dist.data.examples.micro_batch import MicroBatch
from voxtral_dist.data.loader import StepBatches, build_train_loader
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.data.training_set import TrainingSet
from voxtral_dist.distributed.collectives import gather_on_first, max_over_ranks, ranks_unlike_first, sum_over_ranks
from voxtral_dist.distributed.devices import peak_flops, peak_memory_bytes
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.build import build_engine, check_engine, engine_name
from voxtral_dist.engine.engine import Engine
from voxtral_dist.engine.optim import learning_rate
from voxtral_dist.engine.zero.extensions import refuse_old_locks
from voxtral_dist.errors import UserError
from voxtral_dist.evaluation.test_sets import build_test_sets, refuse_different_test_sets
from voxtral_dist.export import export_trained
from voxtral_dist.files import refuse_unwritable, write_atomically
from voxtral_dist.model.encoder import num_chunks
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.flops import BatchShape, TrainingFlops
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.model.voxtral import DTYPES, chosen_attention, trained_meta_model
from voxtral_dist.reporting.results_folder import ReportOptions
from voxtral_dist.reporting.writing import write_report
from voxtral_dist.scoring.normalizer import normalizer
from voxtral_dist.training.evaluator import Evaluator
from voxtral_dist.training.metrics import MetricsLog, StepMetrics, read_metrics
from voxtral_dist.training.selection import Verdict

log = logging.getLogger(__name__)

# A run that was asked to stop ends with the code for "try again later": the same command goes on.
EXIT_STOPPED = 75
# Data workers of a killed rank notice it after some seconds.
_SECONDS_FOR_OTHERS_TO_END = 15.0
# Shares of bad samples mean little before this many samples were seen.
_MIN_UTTERANCES_FOR_FRACTION = 200


@dataclass(frozen=True)
class StepResult:
    """One update: what it measured over all ranks, and what the ranks have to agree on after it."""

    metrics: StepMetrics
    num_utterances: int
    num_bad_utterances: int
    num_too_long: int
    must_stop: bool


def train(config: RunConfig, world: World) -> int:
    """Fine-tune until `config.num_steps`, resuming by itself from the newest complete checkpoint.

    Returns:
        0 at the end, `EXIT_STOPPED` when a signal asked the run to stop before it; its state is saved.
    """
    check_before_loading(config, world)
    prompts = VoxtralPrompts.from_pretrained(config.model.path)
    storage = Storage(config.storage)
    steps = build_train_loader(
        config.train_data, prompts, config.seed, config.num_steps, world.rank, world.size, storage
    )
    refuse_different_data(steps.training_set.fingerprint, world)
    test_sets = build_test_sets(config.evaluation, prompts, config.train_data.target_text, storage)
    refuse_different_test_sets(test_sets, world)
    log_mel = LogMel.from_pretrained(config.model.path, world.device)
    engine = build_engine(config, log_mel, world, steps.training_set.max_windows_per_micro_batch)
    flops = training_flops(config)
    checkpoints = CheckpointDirectory(config, steps.training_set.fingerprint, world)
    progress = checkpoints.resume(engine) or TrainProgress()
    evaluator = Evaluator(config, prompts, log_mel, test_sets, world)

    with _stop_signals() as stop, _metrics_log(config, progress, world) as log:
        _announce(config, progress, steps.training_set, engine.parameter_table(), world, log)
        if evaluator.is_owed(progress.step):
            evaluator.evaluate(engine, progress.step, log)
        verdict = evaluator.verdict(checkpoints.intact_steps, progress.step, log)
        checkpoints.kept_step = verdict.best_step
        bad = _BadUtteranceLimits(config.train_data)
        started = time.monotonic()
        for batches in steps.starting_at(config.num_steps if verdict.must_stop else progress.step):
            result = train_step(config, engine, batches, stop.requested, world, flops)
            # With the time that was spent waiting for the data of the step.
            step_seconds = time.monotonic() - started
            progress = _advance(progress, result, step_seconds)
            log.train_step(progress.step, replace(result.metrics, step_seconds=step_seconds))
            bad.check(progress, batches.micro_batches, result, log, world)
            is_last = progress.step == config.num_steps
            is_due = evaluator.is_due(progress.step)
            if is_due or result.must_stop or is_last or progress.step % config.checkpoint.every_steps == 0:
                saved = checkpoints.save(engine, progress)
                log.write("checkpoint", progress.step, {"path": saved.name})
            if result.must_stop and not is_last:
                return _stopped(progress, log)
            if is_due:
                evaluator.evaluate(engine, progress.step, log)
                verdict = evaluator.verdict(checkpoints.intact_steps, progress.step, log)
                checkpoints.kept_step = verdict.best_step
                if verdict.must_stop:
                    break
                # The state is saved; the next step would only have to be saved again.
                if not is_last and max_over_ranks([int(stop.requested)], world)[0]:
                    return _stopped(progress, log)
            started = time.monotonic()
        if verdict.best_step not in (None, progress.step):
            checkpoints.load(engine, verdict.best_step)
        export_trained(engine, config.model.path, config.trainable.lora, _export_dtype(config), config.run_dir, world)
        if world.is_first:
            write_summary(config, progress, verdict, world)
            try_to_report(config.run_dir, config.evaluation.normalizer)
        log.say(f"Done: the model is in {config.run_dir / 'export'}, the summary in {config.run_dir / 'summary.json'}.")
    return 0


def _stopped(progress: TrainProgress, log: MetricsLog) -> int:
    log.say(f"Stopped at step {progress.step} by a signal; the same command goes on from there.")
    return EXIT_STOPPED


def check_before_loading(config: RunConfig, world: World) -> None:
    """Refuse, within a second and before a model is loaded, what would fail hours later.

    Raises:
        UserError: DeepSpeed's file or the normalizer is not usable, a killed build left its lock, or `run_dir` cannot
            be written or another process writes there.
    """
    check_engine(config, world.size)
    normalizer(config.evaluation.normalizer)
    if config.engine.deepspeed is not None:
        refuse_old_locks()
    refuse_unwritable("run_dir", config.run_dir)
    if world.is_first:
        _lock_run_dir(config.run_dir)


def refuse_different_data(fingerprint: str, world: World) -> None:
    """Refuse ranks whose plans differ: their steps would not fit together, and in the end they would wait forever.

    Raises:
        UserError: a rank sees other shards or another index than rank 0.
    """
    different = ranks_unlike_first(fingerprint, world)
    if different:
        raise UserError(
            f"`train_data`: the ranks {different[:8]} see other shards than rank 0, another index of them, or other "
            "words of contexts: copy shard sets and words to all nodes again, or put them on storage that all share."
        )


def _lock_run_dir(run_dir: Path) -> None:
    """Keep other runs out for as long as this process lives, such as ranks that a killed launcher left behind."""
    descriptor = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT)
    deadline = time.monotonic() + _SECONDS_FOR_OTHERS_TO_END
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"`run_dir`: another process on this machine writes to {run_dir}: end it, or choose another folder."
                ) from error
            time.sleep(0.5)
        except OSError:
            return log.warning("%s is on a file system without locks: nothing keeps a second run out.", run_dir)


def training_flops(config: RunConfig) -> TrainingFlops:
    """What counts the floating point operations of a run's batches."""
    meta_model = trained_meta_model(config.model, config.trainable, DTYPES[config.model.precision])
    return TrainingFlops(meta_model, config.model)


def _metrics_log(config: RunConfig, progress: TrainProgress, world: World) -> MetricsLog:
    peak_of_rank = peak_flops(world.device, config.model.precision, config.metrics.peak_tflops)
    return MetricsLog(
        config.run_dir,
        config.num_steps,
        progress.step,
        world,
        peak_flops=peak_of_rank and peak_of_rank * world.size,
        with_tensorboard=config.metrics.tensorboard,
    )


def train_step(
    config: RunConfig,
    engine: Engine,
    batches: StepBatches,
    stop_requested: bool,
    world: World,
    flops: TrainingFlops | None = None,
) -> StepResult:
    """One update in which every target token of the global batch weighs the same; its `step_seconds` are 0.

    Args:
        config: of the run.
        engine: that holds the model.
        batches: of this rank.
        stop_requested: whether a signal asked this rank to stop.
        world: all ranks.
        flops: what counts the operations of the model; None counts none.

    Raises:
        UserError: the loss or the gradient is not finite; all ranks see it alike, and nothing of it is saved.
    """
    micro_batches, most = _with_equal_chunks(config, batches, world)
    needed = _needed_by(micro_batches)
    num_target_tokens, num_tokens, model_flops, audio_seconds, num_utterances, num_bad, num_too_long, stop = (
        sum_over_ranks(
            [
                sum(batch.num_target_tokens for batch in micro_batches),
                needed.num_positions,
                flops.model(needed) if flops else 0.0,
                sum(batch.audio_seconds for batch in micro_batches),
                sum(batch.num_utterances for batch in micro_batches),
                sum(len(batch.bad_utterances) for batch in micro_batches),
                sum(bad.is_too_long for batch in micro_batches for bad in batch.bad_utterances),
                float(stop_requested),
            ],
            world,
        )
    )
    loss_sum = torch.zeros((), device=world.device)
    for number, batch in enumerate(micro_batches):
        # Dropout, where a model has any, depends on the place in the run and not on what ran before.
        torch.manual_seed(_seed_of(config.seed, batches.step, world.rank + number * world.size))
        is_last = number == len(micro_batches) - 1
        loss_sum += engine.backward(batch, max(1, int(num_target_tokens)), is_last=is_last)
    mean_loss = sum_over_ranks([float(loss_sum)], world)[0] / max(1.0, num_target_tokens)
    _refuse_not_finite("loss", mean_loss, batches.step)
    update = engine.step(learning_rate(config.optimizer, batches.step, config.num_steps))
    if not update.is_skipped:
        _refuse_not_finite("norm of the gradient", update.grad_norm, batches.step)
    metrics = StepMetrics(
        loss=mean_loss,
        num_target_tokens=int(num_target_tokens),
        num_tokens=int(num_tokens),
        audio_seconds=audio_seconds,
        model_flops=model_flops,
        learning_rate=update.learning_rate,
        grad_norm=None if update.is_skipped else update.grad_norm,
        step_seconds=0.0,
        waiting_seconds=most.waiting_seconds,
        memory_gigabytes=most.memory_gigabytes,
    )
    return StepResult(metrics, int(num_utterances), int(num_bad), int(num_too_long), stop > 0)


@dataclass(frozen=True)
class _Most:
    """On the rank that has most of it."""

    waiting_seconds: float
    memory_gigabytes: float


def _with_equal_chunks(config: RunConfig, batches: StepBatches, world: World) -> tuple[list[MicroBatch], _Most]:
    """The micro-batches with as many passes of the encoder as the rank with the most windows needs.

    Sharded engines exchange weights in every pass, so all ranks must make equally many. In the same maximum over ranks
    they tell each other how long they waited for data, and how much memory they needed so far.
    """
    waiting_microseconds = round(1e6 * batches.waiting_seconds)
    *most_windows, waiting, memory = max_over_ranks(
        [
            *(batch.num_windows for batch in batches.micro_batches),
            waiting_microseconds,
            peak_memory_bytes(world.device),
        ],
        world,
    )
    micro_batches = [
        replace(batch, num_encoder_chunks=num_chunks(most, config.model.encoder_windows_per_chunk))
        for batch, most in zip(batches.micro_batches, most_windows, strict=True)
    ]
    return micro_batches, _Most(waiting / 1e6, memory / 1e9)


def _needed_by(micro_batches: Sequence[MicroBatch]) -> BatchShape:
    """What the mathematics of a step needs on this rank: neither padding nor micro-batches of weight zero."""
    shapes = (
        BatchShape.needed(batch.num_windows, batch.positions_per_example, batch.num_target_tokens)
        for batch in micro_batches
        if batch.num_utterances
    )
    return sum(shapes, BatchShape())


def _refuse_not_finite(name: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise UserError(
            f"The {name} is {value} at step {step + 1}, so the run ends; the newest checkpoint is from before it. "
            "Lower `optimizer.learning_rate`, lengthen `optimizer.warmup_steps`, or look for broken transcripts."
        )


def write_summary(config: RunConfig, progress: TrainProgress, verdict: Verdict, world: World) -> None:
    """Write `summary.json` from what the run recorded: before and of what is exported, on the first test set."""
    recorded = read_metrics(config.run_dir / "metrics.jsonl")
    first_set = next(iter(config.evaluation.test_sets), None)
    rows = [row for row in recorded if row["kind"] == "evaluation" and row["name"] == first_set]
    exported_step = verdict.best_step or progress.step
    last = next((row for row in reversed(rows) if row["step"] <= exported_step), None)
    summary = {
        "test_set": first_set,
        "wer_before": rows[0]["wer"] if rows and rows[0]["step"] == 0 else None,
        "wer_after": last["wer"] if last else None,
        "num_utterances": last["num_utterances"] if last else 0,
        "train_seconds": round(progress.train_seconds, 2),
        "audio_seconds_per_second": round(progress.audio_seconds / progress.train_seconds, 2),
        **_efficiency([row for row in recorded if row["kind"] == "train"]),
        "num_steps": progress.step,
        "exported_step": exported_step,
        "best_wer": verdict.best_wer,
        "num_bad_utterances": progress.num_bad_utterances,
        "num_too_long": progress.num_too_long,
        "world_size": world.size,
        "engine": engine_name(config.engine),
    }
    write_atomically(config.run_dir / "summary.json", json.dumps(summary, indent=1))


def try_to_report(run_dir: Path, normalizer_name: str) -> None:
    """Write `report.html` and `report.md`, or say why not: the model is trained either way."""
    try:
        write_report(run_dir, ReportOptions(normalizer=normalizer_name))
    except Exception as error:
        log.warning(
            "The report could not be written (%s: %s): mend that, then run `voxtral-dist report %s`.",
            type(error).__name__,
            error,
            run_dir,
        )


def _efficiency(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Means over the time of training, and the most memory, of the rows that have these figures."""
    rows = [row for row in rows if "waiting_seconds" in row]
    measured = [row for row in rows if row["model_flops_utilization"] is not None]
    seconds = sum(row["step_seconds"] for row in measured)
    used = sum(row["model_flops_utilization"] * row["step_seconds"] for row in measured)
    waiting = sum(row["waiting_seconds"] for row in rows)
    return {
        "model_flops_utilization": round(used / seconds, 4) if seconds else None,
        "waiting_fraction": round(waiting / sum(row["step_seconds"] for row in rows), 4) if rows else None,
        "memory_gigabytes": max((row["memory_gigabytes"] for row in rows), default=None),
    }


class _BadUtteranceLimits:
    """Names every unusable sample in the log, and ends a run whose data is broken."""

    def __init__(self, config: TrainDataConfig) -> None:
        self._config = config
        self._in_a_row = 0

    def check(
        self,
        progress: TrainProgress,
        micro_batches: Sequence[MicroBatch],
        result: StepResult,
        log: MetricsLog,
        world: World,
    ) -> None:
        """Called by all ranks together: they count alike, so that they end together."""
        self._in_a_row = 0 if result.num_utterances else self._in_a_row + result.num_bad_utterances
        if result.num_bad_utterances == 0:
            return
        mine = [bad for batch in micro_batches for bad in batch.bad_utterances]
        for bad in (bad for part in gather_on_first(mine, world) for bad in part):
            log.write("event", progress.step, {"event": "bad_utterance", **asdict(bad)})
            log.say(f"step {progress.step}: left out the sample {bad.key} of {bad.shard}: it {bad.reason}")
        if result.num_too_long and self._config.too_long == "refuse":
            raise UserError(
                f"`train_data.too_long` is `refuse`, and {result.num_too_long} samples of step {progress.step} are too "
                "long: metrics.jsonl names each. Raise `max_target_tokens`, cut the recordings, or set "
                "`too_long: skip`."
            )
        # What is too long is left out as the configuration says, and no sign of broken data.
        num_broken = progress.num_bad_utterances - progress.num_too_long
        seen = progress.num_utterances_seen + num_broken
        if seen >= _MIN_UTTERANCES_FOR_FRACTION and num_broken / seen > self._config.max_bad_fraction:
            raise UserError(
                f"{num_broken} of {seen} samples could not be used, more than "
                f"`train_data.max_bad_fraction` ({self._config.max_bad_fraction}) allows: metrics.jsonl names each."
            )
        if self._in_a_row > self._config.max_bad_in_a_row:
            raise UserError(
                f"The last {self._in_a_row} samples could not be used, more than `train_data.max_bad_in_a_row` "
                f"({self._config.max_bad_in_a_row}) allows: metrics.jsonl names each."
            )


@dataclass
class _StopRequest:
    """Whether a signal has asked this process to stop after the current step."""

    requested: bool = False

    def set(self, _signal: int, _frame: FrameType | None) -> None:
        self.requested = True


@contextmanager
def _stop_signals() -> Iterator[_StopRequest]:
    """Turn SIGTERM and SIGUSR1 (what schedulers send before they take a node away) into a request to stop."""
    request = _StopRequest()
    before = {number: signal.signal(number, request.set) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _announce(
    config: RunConfig,
    progress: TrainProgress,
    training_set: TrainingSet,
    parameters: Sequence[str],
    world: World,
    log: MetricsLog,
) -> None:
    """Store the configuration and say what is about to happen."""
    if world.is_first:
        write_atomically(config.run_dir / "config.yaml", dump_config(config))
    values = {
        "world_size": world.size,
        "num_utterances": len(training_set.index),
        "skipped": training_set.streams.skipped,
    }
    log.write("event", progress.step, {"event": "resumed" if progress.step else "started", **values})
    for line in [*training_set.lines(), *parameters]:
        log.say(line)
    where = f"from step {progress.step} " if progress.step else ""
    log.say(
        f"Training {where}on {training_set.streams.num_utterances} utterances, {world.size} ranks, "
        f"{engine_name(config.engine)}, {world.device.type}, {config.model.precision}, "
        f"attention by {chosen_attention(config.model)}"
    )


def _advance(progress: TrainProgress, result: StepResult, step_seconds: float) -> TrainProgress:
    return TrainProgress(
        step=progress.step + 1,
        num_utterances_seen=progress.num_utterances_seen + result.num_utterances,
        num_bad_utterances=progress.num_bad_utterances + result.num_bad_utterances,
        num_too_long=progress.num_too_long + result.num_too_long,
        audio_seconds=progress.audio_seconds + result.metrics.audio_seconds,
        train_seconds=progress.train_seconds + step_seconds,
    )


def _seed_of(seed: int, step: int, slot: int) -> int:
    # Distinct odd multipliers keep (seed, step, slot) apart; torch spreads the bits.
    return (seed * 1_000_003 + step * 65_537 + slot) % 2**63


def _export_dtype(config: RunConfig) -> torch.dtype:
    return torch.float32 if config.model.precision == "float32" else torch.bfloat16
