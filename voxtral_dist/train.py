"""The story of a training run: from a configuration to checkpoints, word error rates and an exported model."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from voxtral_dist.checkpoints.changes import Change, changes_since, refuse_incomparable, refuse_unknown_keys
from voxtral_dist.checkpoints.directory import CheckpointDirectory, checkpoint_folder, latest_step
from voxtral_dist.checkpoints.progress import TrainProgress
from voxtral_dist.checkpoints.remote import fetch_newest
from voxtral_dist.checkpoints.uploads import build_uploads
from voxtral_dist.config import ModelConfig, RunConfig, dump_config
from voxtral_dist.data.loader import StepBatches, TrainLoader, build_train_loader
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.distributed.collectives import first_over_ranks, max_over_ranks
from voxtral_dist.distributed.devices import device_name, peak_flops
from voxtral_dist.distributed.process_settings import set_compile_cache
from voxtral_dist.distributed.standing import data_waits, stand
from voxtral_dist.distributed.watchdog import Watchdog
from voxtral_dist.distributed.world import World, joined_world
from voxtral_dist.engine.build import build_engine, check_engine, engine_name
from voxtral_dist.engine.compilation import with_chosen_compilation
from voxtral_dist.engine.engine import Engine
from voxtral_dist.engine.zero.extensions import refuse_old_locks
from voxtral_dist.errors import ReadError, UserError
from voxtral_dist.estimate.checkpointing import ChosenCheckpointing, with_chosen_checkpointing
from voxtral_dist.evaluation.building import build_test_sets, refuse_different_test_sets
from voxtral_dist.evaluation.decoding_memory import DecodingMemory
from voxtral_dist.evaluation.decoding_weights import shown_weights
from voxtral_dist.evaluation.test_set import TestSet
from voxtral_dist.export import export_trained, serving_notes
from voxtral_dist.files import refuse_unwritable, write_atomically, write_errors_named
from voxtral_dist.model.attention import chosen_attention
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.flops import TrainingFlops, training_flops
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.model.voxtral import read_voxtral_config
from voxtral_dist.output.console import say
from voxtral_dist.output.counting import counted
from voxtral_dist.output.rank_log import open_rank_log, rank_log_closed
from voxtral_dist.reporting.results_folder import ReportOptions
from voxtral_dist.reporting.writing import write_report
from voxtral_dist.scoring.normalizer import normalizer
from voxtral_dist.trackers.processes import followed_by_trackers, refuse_missing_trackers
from voxtral_dist.training.ahead import MicroBatchesAhead
from voxtral_dist.training.bad_utterances import BadUtteranceLimits
from voxtral_dist.training.checkpoint_selector import CheckpointSelector
from voxtral_dist.training.evaluator import Evaluator
from voxtral_dist.training.guards import Guards
from voxtral_dist.training.memory_limits import MemoryLimits
from voxtral_dist.training.metrics_endpoint import MetricsEndpoint, served_metrics
from voxtral_dist.training.metrics_log import MetricsLog
from voxtral_dist.training.requests import Requests
from voxtral_dist.training.run_checks import lock_run_dir, refuse_different_data, refuse_unshared
from voxtral_dist.training.same_run import refuse_different_runs
from voxtral_dist.training.saver import Saver
from voxtral_dist.training.selection import Verdict
from voxtral_dist.training.signals import StopRequest, stop_signals
from voxtral_dist.training.step import TrainStep
from voxtral_dist.training.stragglers import Stragglers
from voxtral_dist.training.summary import write_summary
from voxtral_dist.training.time_limit import Part, TimeLimit
from voxtral_dist.training.versions import package_versions

logger = logging.getLogger(__name__)

# The exit code of a stopped run, which means "try again later": the same command resumes it.
EXIT_STOPPED = 75


def train_model(config: RunConfig, allow_changed: Sequence[str] = ()) -> int:
    """Fine-tune on all ranks that a launcher started, or in this process alone; see `train`.

    Returns:
        0 at the end, `EXIT_STOPPED` where a signal or `max_run_hours` stopped the run before it.

    Raises:
        UserError: the configuration cannot be met.

    Example:
        >>> from pathlib import Path
        >>> from voxtral_dist import load_config, train_model
        >>> exit_code = train_model(load_config(Path("run.yaml"), ["num_steps=1"]))
        >>> exit_code
        0
    """
    limits = config.distributed
    timeout, start_timeout = timedelta(seconds=limits.timeout_seconds), timedelta(seconds=limits.start_timeout_seconds)
    with stop_signals(), joined_world(timeout, start_timeout) as world:
        return train(config, world, allow_changed)


def train(config: RunConfig, world: World, allow_changed: Sequence[str] = ()) -> int:
    """Fine-tune to the last step, from the newest intact checkpoint where there is one.

    Args:
        config: of the run.
        world: all ranks.
        allow_changed: keys of the configuration that a resumed run may change, although its results before and after
            cannot be compared.

    Returns:
        0 at the end; `EXIT_STOPPED` where a signal or `max_run_hours` stopped the run before it, after its state was
        saved.

    Raises:
        UserError: the configuration, the model, the data and this machine do not fit together.
        ReadError: on all ranks; shards cannot be read because their storage fails. The state was saved.
    """
    port, limit_seconds = config.metrics.prometheus_port, config.distributed.timeout_seconds
    with stop_signals() as stop, rank_log_closed(), served_metrics(port, limit_seconds, world) as endpoint:
        try:
            return _train(config, world, stop, endpoint, allow_changed)
        except _StoppedEarlyError:
            return EXIT_STOPPED


def _train(
    config: RunConfig, world: World, stop: StopRequest, endpoint: MetricsEndpoint | None, allow_changed: Sequence[str]
) -> int:
    time_limit = TimeLimit(config.max_run_hours)
    refuse_different_runs(config, allow_changed, world)
    refuse_unknown_keys(allow_changed, config)
    check_before_loading(config, world)
    fetch_newest(config, world)
    open_rank_log(config.run_dir / "logs", world.rank, world.size)
    set_compile_cache(config.storage.cache_dir)
    chosen, checkpointing = with_chosen_checkpointing(with_chosen_compilation(config, world), world)
    prompts = VoxtralPrompts.from_pretrained(config.model.path, config.model.max_positions)
    storage = Storage(config.storage)
    loader = build_train_loader(
        config.train_data,
        prompts,
        config.seed,
        config.total_steps,
        world.rank,
        world.size,
        storage,
        pin_memory=world.device.type == "cuda",
    )
    refuse_different_data(loader.training_set.fingerprint, world)
    test_sets = build_test_sets(config.evaluation, prompts, config.train_data.target_text, storage)
    refuse_different_test_sets(test_sets, world)
    log_mel = LogMel.from_pretrained(config.model.path, world.device)
    fingerprints = {test_set.name: test_set.fingerprint for test_set in test_sets}
    saved_step = latest_step(config.run_dir, world)
    changes = [] if saved_step is None else _changes(config, saved_step, loader.num_steps, fingerprints, allow_changed)
    _end_if_asked(stop, world)

    with ExitStack() as stack:
        # Workers are forked before the engine exists: else each page of weights and moments in host memory would be
        # shared with them, and copied by the system at the first update.
        steps = stack.enter_context(loader.starting_at(saved_step or 0))
        stack.enter_context(Watchdog(config.run_dir, config.distributed.watchdog_seconds, world))
        engine = build_engine(chosen, log_mel, world, loader.training_set.max_windows_per_micro_batch)
        flops = training_flops(chosen.model, config.trainable)
        checkpoints = CheckpointDirectory(config, loader.training_set.fingerprint, world, fingerprints)
        progress = checkpoints.load(engine, saved_step)
        _end_if_asked(stop, world)
        metrics_log = stack.enter_context(_open_metrics_log(config, loader.num_steps, progress, world, endpoint))
        _announce(
            config, chosen.model, checkpointing, progress, loader, engine.parameter_table(), world, metrics_log, changes
        )
        stack.enter_context(followed_by_trackers(config.run_dir, config.metrics.trackers, world, metrics_log.say))
        evaluator = _build_evaluator(config, loader.num_steps, engine, prompts, log_mel, test_sets, metrics_log, world)
        selector = CheckpointSelector(config.evaluation.selection, config.run_dir, checkpoints, metrics_log, world)
        saver = Saver(
            config.checkpoint, checkpoints, engine, metrics_log, time_limit, world, uploads=build_uploads(config)
        )
        stack.push(saver.outlast)
        bad_utterances = BadUtteranceLimits(config.train_data, metrics_log, world, saver.newest)
        stragglers = Stragglers(metrics_log, world, socket.gethostname())
        guards = Guards(config.optimizer, progress.guards)
        limits = MemoryLimits.read(config, world)
        _announce_limits(limits, progress, metrics_log)
        step = build_train_step(config, engine, world, flops, loader.num_steps, saver.newest, log_mel, guards, limits)
        uploads = metrics_log.rows("event") if config.checkpoint.upload else ()
        time_limit.remember(metrics_log.rows("checkpoint"), metrics_log.rows("evaluation"), uploads)
        if evaluator.is_owed(progress.step):
            with time_limit.measuring("evaluation"):
                is_complete = evaluator.evaluate(progress.step, lambda: stop.requested)
            if not is_complete:
                return _stopped(config, progress, metrics_log, by_signal=True)
        verdict = selector.select(progress.step)
        for batches in () if verdict.must_stop else data_waits(steps, progress.step):
            result = step.run(batches, _requests(stop, time_limit, evaluator, saver, progress.step + 1, batches))
            progress = result.advance(progress)
            time_limit.record("step", result.metrics.step_seconds)
            metrics_log.train_step(progress.step, result.metrics)
            metrics_log.incident(progress.step, result.incident)
            bad_utterances.check(progress, batches.micro_batches, result)
            is_last = progress.step == loader.num_steps
            is_evaluated = evaluator.is_due(progress.step)
            agreed = result.agreed
            must_stop = agreed.stop_in_time or agreed.cannot_read or (agreed.stop and not is_last)
            stragglers.after_step(progress.step, batches.waiting_seconds)
            saver.after_step(progress, agreed, is_awaited=is_last or is_evaluated or must_stop)
            if must_stop:
                saver.finish_uploads()
                _refuse_unread(batches, agreed, progress, world)
                return _stopped(config, progress, metrics_log, by_signal=agreed.stop)
            if is_evaluated:
                with time_limit.measuring("evaluation"):
                    is_complete = evaluator.evaluate(progress.step, lambda: stop.requested)
                if not is_complete:
                    saver.finish_uploads()
                    return _stopped(config, progress, metrics_log, by_signal=True)
                verdict = selector.select(progress.step)
                if verdict.must_stop:
                    break
                # The state is saved already: one more step would have to be saved again.
                is_short = time_limit.is_too_short_for("step", "save", *saver.owed_uploads())
                by_signal, in_time = max_over_ranks([int(stop.requested), int(is_short)], world)
                if not is_last and (by_signal or in_time):
                    saver.finish_uploads()
                    return _stopped(config, progress, metrics_log, by_signal=bool(by_signal))
        steps.close()
        stand("end", progress.step)
        verdict = _load_selected(engine, progress, verdict, selector, checkpoints)
        with shown_weights(engine, config.evaluation):
            export_trained(engine, config, world, verdict.best_step or progress.step)
        metrics_log.refuse_if_gone()
        if world.is_first:
            _conclude(config, progress, verdict, world)
        saver.finish_uploads()
        metrics_log.say(
            f"Done: the exported model is in {config.run_dir}, the summary in {config.run_dir / 'summary.json'}."
        )
    return 0


def check_before_loading(config: RunConfig, world: World) -> None:
    """Refuse, within a second and before a model is loaded, what would fail hours later.

    Raises:
        UserError: DeepSpeed's file, the normalizer or a text step is unusable, a killed build left its lock, or
            `run_dir` cannot be written, is in use by another process, or is another folder on some ranks.
    """
    check_engine(config, world.size, world.device)
    normalizer(config.evaluation.normalizer, config.train_data.target_text)
    refuse_missing_trackers(config.metrics.trackers)
    if config.engine.deepspeed is not None:
        refuse_old_locks()
    refuse_unwritable("run_dir", config.run_dir)
    if world.is_first:
        lock_run_dir(config.run_dir)
    refuse_unshared(config.run_dir, world)


def build_train_step(
    config: RunConfig,
    engine: Engine,
    world: World,
    flops: TrainingFlops | None = None,
    num_steps: int | None = None,
    newest_checkpoint: Callable[[], str | None] = lambda: None,
    log_mel: LogMel | None = None,
    guards: Guards | None = None,
    limits: MemoryLimits | None = None,
) -> TrainStep:
    """The update of a run; without `flops` its model FLOPs are recorded as 0.

    Without `log_mel` the engine computes features when it needs them; without `guards` and `limits` new ones remember
    nothing.
    `num_steps` is the number of steps of the run, which a configuration with `num_epochs` does not tell.
    """
    num_steps = num_steps or config.num_steps
    assert num_steps is not None, "the loader knows the steps of `num_epochs`"
    return TrainStep(
        engine=engine,
        optimizer=config.optimizer,
        num_steps=num_steps,
        seed=config.seed,
        encoder_windows_per_chunk=config.model.encoder_windows_per_chunk,
        mlp_chunk_tokens=config.model.mlp_chunk_tokens,
        world=world,
        ahead=MicroBatchesAhead(log_mel, world.device),
        guards=guards or Guards(config.optimizer),
        limits=limits or MemoryLimits(config, world),
        flops=flops,
        newest_checkpoint=newest_checkpoint,
    )


def _open_metrics_log(
    config: RunConfig, num_steps: int, progress: TrainProgress, world: World, endpoint: MetricsEndpoint | None
) -> MetricsLog:
    peak_of_rank = peak_flops(world.device, config.model.precision, config.metrics.peak_tflops)
    return MetricsLog(
        config.run_dir,
        num_steps,
        progress.step,
        world,
        peak_flops=peak_of_rank and peak_of_rank * world.size,
        with_tensorboard=config.metrics.tensorboard,
        endpoint=endpoint,
    )


def _build_evaluator(
    config: RunConfig,
    num_steps: int,
    engine: Engine,
    prompts: VoxtralPrompts,
    log_mel: LogMel,
    test_sets: Sequence[TestSet],
    metrics_log: MetricsLog,
    world: World,
) -> Evaluator:
    return Evaluator(
        settings=config.evaluation,
        num_steps=num_steps,
        engine=engine,
        prompts=prompts,
        log_mel=log_mel,
        normalizer=normalizer(config.evaluation.normalizer, config.train_data.target_text),
        test_sets=test_sets,
        decoding_bytes=DecodingMemory(
            read_voxtral_config(config.model.path), config.model, config.evaluation, world.device.type
        ).peak_bytes(shape for test_set in test_sets for shape in test_set.decoding_shapes),
        out_dir=config.run_dir / "evaluations",
        metrics_log=metrics_log,
        world=world,
    )


def _announce(
    config: RunConfig,
    model: ModelConfig,
    checkpointing: ChosenCheckpointing | None,
    progress: TrainProgress,
    loader: TrainLoader,
    parameter_table: Sequence[str],
    world: World,
    metrics_log: MetricsLog,
    changes: Sequence[Change],
) -> None:
    """Store the configuration, and print what has changed, and what is about to be trained on what.

    `model` and `checkpointing` say what `auto` has become.
    """
    if world.is_first:
        with write_errors_named("The configuration", config.run_dir):
            write_atomically(config.run_dir / "config.yaml", dump_config(config))
    training_set = loader.training_set
    num_epochs = loader.num_steps / training_set.plan.steps_per_epoch
    event: dict[str, Any] = {
        "event": "resumed" if progress.step else "started",
        "world_size": world.size,
        "num_steps": loader.num_steps,
        "num_epochs": round(num_epochs, 4),
        "num_utterances": len(training_set.index),
        "skipped": training_set.streams.skipped,
        "engine": engine_name(config.engine),
        "device": device_name(world.device),
        "versions": package_versions(),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if world.is_first:
        event["audio_seconds"] = training_set.streams.seconds_by_language(training_set.index)
    metrics_log.write("event", progress.step, event)
    for change in changes:
        metrics_log.say(f"Changed since step {progress.step}: {change}")
        metrics_log.write("event", progress.step, {"event": "changed", **asdict(change)})
    chosen = [checkpointing.line] if checkpointing else []
    for line in [*training_set.lines(), *parameter_table, *chosen, *serving_notes(config)]:
        metrics_log.say(line)
    start = f"from step {progress.step} " if progress.step else ""
    metrics_log.say(
        f"Training {start}for {counted(loader.num_steps, 'step')} ({counted(num_epochs, 'epoch', '.4g')}) on "
        f"{counted(training_set.streams.num_utterances, 'utterance')}, {counted(world.size, 'rank')}, "
        f"{engine_name(config.engine)}, {world.device.type}, {config.model.precision}, "
        f"{chosen_attention(model)} attention{', compiled blocks' if model.compile_blocks else ''}"
    )


def _announce_limits(limits: MemoryLimits, progress: TrainProgress, metrics_log: MetricsLog) -> None:
    """Say and record, once, that micro-batches are divided, where memory has run out before."""
    if limits.exceeded:
        metrics_log.say(str(limits))
        metrics_log.write("event", progress.step, {"event": "divided", **asdict(limits.exceeded[-1])})


def _requests(
    stop: StopRequest, time_limit: TimeLimit, evaluator: Evaluator, saver: Saver, step: int, batches: StepBatches
) -> Callable[[], Requests]:
    """What this rank asks for after its next update, which will be the run's number `step`.

    Time is looked at before the update; signals, and what a thread has written, when the ranks tell each other.
    """
    # A run that stops before an evaluation begins with it when it resumes.
    following: tuple[Part, ...] = ("evaluation",) if evaluator.is_due(step) else ("step",)
    if step == evaluator.num_steps:
        # An export takes about as long as a save.
        following = ("evaluation", "save")
    by_clock = Requests(
        stop_in_time=time_limit.is_too_short_for("step", "save", *following, *saver.owed_uploads()),
        save=time_limit.needs_a_save(),
        save_in_background=saver.is_time(),
        cannot_read=batches.upcoming is not None and batches.upcoming.read_error is not None,
    )
    return lambda: replace(by_clock, stop=stop.requested, is_written=saver.is_written())


def _refuse_unread(batches: StepBatches, agreed: Requests, progress: TrainProgress, world: World) -> None:
    """End the run on all ranks, after its state was saved, where this is why it stops.

    Raises:
        ReadError: a rank cannot read its next step, because the storage of the shards fails.
    """
    if not agreed.cannot_read or agreed.stop or agreed.stop_in_time:
        return
    reason = first_over_ranks(None if batches.upcoming is None else batches.upcoming.read_error, world)
    raise ReadError(f"Stopped at step {progress.step}, which is saved: {reason}")


def _changes(
    config: RunConfig, saved_step: int, num_steps: int, test_sets: Mapping[str, str], allow_changed: Sequence[str]
) -> list[Change]:
    """What has changed since the checkpoint from which the run resumes.

    Raises:
        UserError: the run is past its last step, or results could not be compared.
    """
    if saved_step > num_steps:
        raise UserError(
            f"The run ends at step {num_steps} (`num_steps` or `num_epochs`), but its newest checkpoint is of step "
            f"{saved_step}: set at least {counted(saved_step, 'step')}, or choose another `run_dir`."
        )
    folder = checkpoint_folder(config.run_dir, saved_step)
    changes = changes_since(folder, config, test_sets)
    refuse_incomparable(folder, changes, allow_changed)
    return changes


def _load_selected(
    engine: Engine,
    progress: TrainProgress,
    verdict: Verdict,
    selector: CheckpointSelector,
    checkpoints: CheckpointDirectory,
) -> Verdict:
    """Load the best checkpoint; where it is damaged, the best of the others. Returns the verdict that holds."""
    while verdict.best_step is not None and verdict.best_step != progress.step:
        if checkpoints.is_intact(verdict.best_step):
            checkpoints.load(engine, verdict.best_step)
            break
        verdict = selector.select(progress.step)
    return verdict


class _StoppedEarlyError(Exception):
    """A signal asked the run to stop before training began."""


def _end_if_asked(stop: StopRequest, world: World) -> None:
    """End the run on all ranks if a signal has asked any of them to stop; there is nothing to save yet.

    Raises:
        _StoppedEarlyError: one was asked.
    """
    if max_over_ranks([int(stop.requested)], world)[0]:
        if world.is_first:
            say("Stopped by a signal before training began: rerun the same command to resume.")
        raise _StoppedEarlyError


def _stopped(config: RunConfig, progress: TrainProgress, metrics_log: MetricsLog, *, by_signal: bool) -> int:
    why = "by a signal" if by_signal else f"before the end of `max_run_hours` ({config.max_run_hours:g})"
    metrics_log.say(f"Stopped at step {progress.step} {why}: rerun the same command to resume.")
    return EXIT_STOPPED


def _conclude(config: RunConfig, progress: TrainProgress, verdict: Verdict, world: World) -> None:
    """Write the summary and the report of a finished run."""
    with write_errors_named("The summary", config.run_dir):
        write_summary(
            config.run_dir,
            next(iter(config.evaluation.test_sets), None),
            progress,
            verdict,
            world_size=world.size,
            engine=engine_name(config.engine),
        )
    trusted = ReportOptions(normalizer=config.evaluation.normalizer, target_text=config.train_data.target_text)
    try_to_report(config.run_dir, trusted)


def try_to_report(run_dir: Path, options: ReportOptions) -> None:
    """Write `report.html` and `report.md`, or log why not: the model is trained either way."""
    try:
        write_report(run_dir, options)
    except Exception as error:
        logger.warning(
            "The report could not be written (%s: %s): fix that, then run `voxtral-dist report %s`.",
            type(error).__name__,
            error,
            run_dir,
        )
