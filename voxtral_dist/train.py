"""The story of a training run: from a configuration to checkpoints, word error rates and an exported model."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from voxtral_dist.checkpoints.changes import Change, changes_since, refuse_incomparable, refuse_unknown_keys
from voxtral_dist.checkpoints.directory import CheckpointDirectory, checkpoint_folder, latest_step
from voxtral_dist.checkpoints.progress import TrainProgress
from voxtral_dist.checkpoints.remote import fetch_newest
from voxtral_dist.checkpoints.uploads import build_uploads
from voxtral_dist.config import RunConfig
from voxtral_dist.data.loader import TrainLoader, build_train_loader
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.distributed.collectives import max_over_ranks
from voxtral_dist.distributed.devices import peak_flops
from voxtral_dist.distributed.process_settings import set_compile_cache
from voxtral_dist.distributed.standing import stand
from voxtral_dist.distributed.watchdog import Watchdog
from voxtral_dist.distributed.world import World, joined_world
from voxtral_dist.engine.build import build_engine, check_engine, engine_name
from voxtral_dist.engine.compilation import with_chosen_compilation
from voxtral_dist.engine.engine import Engine
from voxtral_dist.engine.zero.extensions import refuse_old_locks
from voxtral_dist.errors import UserError
from voxtral_dist.estimate.checkpointing import with_chosen_checkpointing
from voxtral_dist.evaluation.building import build_test_sets, refuse_different_test_sets
from voxtral_dist.evaluation.decoding_memory import DecodingMemory
from voxtral_dist.evaluation.decoding_weights import shown_weights
from voxtral_dist.evaluation.test_set import TestSet
from voxtral_dist.export import export_trained, serving_notes
from voxtral_dist.files import refuse_unwritable, write_errors_named
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
from voxtral_dist.training.announcement import announce, announce_limits, training_line
from voxtral_dist.training.bad_utterances import BadUtteranceLimits
from voxtral_dist.training.checkpoint_selector import CheckpointSelector
from voxtral_dist.training.evaluator import Evaluator
from voxtral_dist.training.guards import Guards
from voxtral_dist.training.memory_limits import MemoryLimits
from voxtral_dist.training.metrics_endpoint import MetricsEndpoint, served_metrics
from voxtral_dist.training.metrics_log import MetricsLog
from voxtral_dist.training.outcome import outcome_lines
from voxtral_dist.training.run_checks import lock_run_dir, refuse_different_data, refuse_unshared
from voxtral_dist.training.same_run import refuse_different_runs
from voxtral_dist.training.saver import Saver
from voxtral_dist.training.selection import Verdict
from voxtral_dist.training.signals import StopRequest, stop_signals
from voxtral_dist.training.step import TrainStep
from voxtral_dist.training.stragglers import Stragglers
from voxtral_dist.training.summary import write_summary
from voxtral_dist.training.time_limit import TimeLimit
from voxtral_dist.training.training_loop import StopReason, TrainingLoop

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
    with stop_signals(), joined_world(*config.distributed.timeouts) as world:
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
    data = prepare(config, world)
    saved_step = latest_step(config.run_dir, world)
    changes = changes_of(config, saved_step, data.num_steps, data.test_set_fingerprints, allow_changed)
    _end_if_asked(stop, world)
    with ExitStack() as stack:
        # Workers are forked before the engine exists: else each page of weights and moments in host memory would be
        # shared with them, and copied by the system at the first update.
        steps = stack.enter_context(data.loader.starting_at(saved_step or 0))
        stack.enter_context(Watchdog(config.run_dir, config.distributed.watchdog_seconds, world))
        engine = data.build_engine(world)
        checkpoints = CheckpointDirectory(config, data.fingerprint, world, data.test_set_fingerprints)
        progress = checkpoints.load(engine, saved_step)
        _end_if_asked(stop, world)
        metrics_log = stack.enter_context(_open_metrics_log(config, data.num_steps, progress, world, endpoint))
        notes = [*engine.parameter_table(), *data.notes, *serving_notes(config)]
        announce(config, data.loader, progress, changes, notes, world, metrics_log)
        metrics_log.say(training_line(data.chosen, data.loader, progress.step, world))
        stack.enter_context(followed_by_trackers(config.run_dir, config.metrics.trackers, world, metrics_log.say))
        saver = Saver(
            config.checkpoint, checkpoints, engine, metrics_log, time_limit, world, uploads=build_uploads(config)
        )
        stack.push(saver.outlast)
        limits = MemoryLimits.read(config, world)
        announce_limits(limits, progress, metrics_log)
        time_limit.remember(
            metrics_log.rows("checkpoint"), metrics_log.rows("evaluation"), metrics_log.rows("uploaded")
        )
        loop = TrainingLoop(
            step=data.build_step(engine, world, saver.newest, Guards(config.optimizer, progress.guards), limits),
            evaluator=_build_evaluator(
                config, data.num_steps, engine, data.prompts, data.log_mel, data.test_sets, metrics_log, world
            ),
            selector=CheckpointSelector(config.evaluation.selection, config.run_dir, checkpoints, metrics_log, world),
            saver=saver,
            bad_utterances=BadUtteranceLimits(config.train_data, metrics_log, world, saver.newest),
            stragglers=Stragglers(metrics_log, world, socket.gethostname()),
            metrics_log=metrics_log,
            time_limit=time_limit,
            stop=stop,
            world=world,
            progress=progress,
        )
        reason = loop.run(steps)
        if reason is not None:
            return _stopped(config, loop.progress, metrics_log, reason)
        steps.close()
        _finish(config, engine, loop, checkpoints, world)
    return 0


def _finish(
    config: RunConfig, engine: Engine, loop: TrainingLoop, checkpoints: CheckpointDirectory, world: World
) -> None:
    """Export the selected or the last weights, write summary and report, and say the result."""
    progress, metrics_log = loop.progress, loop.metrics_log
    stand("end", progress.step)
    verdict = _load_selected(engine, progress, loop.verdict, loop.selector, checkpoints)
    step = verdict.best_step or progress.step
    with shown_weights(engine, config.evaluation):
        export_trained(engine, config, world, step)
    metrics_log.refuse_if_gone()
    if world.is_first:
        _conclude(config, progress, verdict, world)
    loop.saver.finish_uploads()
    for line in outcome_lines(metrics_log.rows("evaluation"), verdict, step, config.run_dir):
        metrics_log.say(line)
    metrics_log.say(
        f"Done: the exported model is in {config.run_dir}, the summary in {config.run_dir / 'summary.json'}."
    )


@dataclass(frozen=True)
class Prepared:
    """What a run knows before its engine is built, the same on all ranks but for the loader.

    config: of the run. chosen: the same with values in the place of `auto`. notes: lines about these choices.
    """

    config: RunConfig
    chosen: RunConfig
    notes: Sequence[str]
    prompts: VoxtralPrompts
    loader: TrainLoader
    test_sets: Sequence[TestSet]
    log_mel: LogMel

    @property
    def num_steps(self) -> int:
        """Steps of the run."""
        return self.loader.num_steps

    @property
    def fingerprint(self) -> str:
        """Hash of the training set and its order."""
        return self.loader.training_set.fingerprint

    @property
    def test_set_fingerprints(self) -> dict[str, str]:
        """Fingerprints of the test sets by name."""
        return {test_set.name: test_set.fingerprint for test_set in self.test_sets}

    def build_engine(self, world: World) -> Engine:
        """Load the model and shard it."""
        return build_engine(self.chosen, self.log_mel, world, self.loader.training_set.max_windows_per_micro_batch)

    def build_step(
        self,
        engine: Engine,
        world: World,
        newest_checkpoint: Callable[[], str | None] = lambda: None,
        guards: Guards | None = None,
        limits: MemoryLimits | None = None,
    ) -> TrainStep:
        """The update of the run."""
        flops = training_flops(self.chosen.model, self.config.trainable)
        return build_train_step(
            self.config, engine, world, flops, self.num_steps, newest_checkpoint, self.log_mel, guards, limits
        )


def prepare(config: RunConfig, world: World) -> Prepared:
    """Choose what is `auto`, and read the indices of all data, before a model is loaded. All ranks call it together.

    Raises:
        UserError: shards are missing, or ranks see different ones; or the configuration does not fit the data.
    """
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
    notes = [checkpointing.line] if checkpointing else []
    return Prepared(config, chosen, notes, prompts, loader, test_sets, log_mel)


def check_settings(config: RunConfig, world: World) -> None:
    """Refuse, within a second and before a model is loaded, settings that would fail hours later.

    Raises:
        UserError: DeepSpeed's file, the normalizer or a text step is unusable, a package is missing, or a killed build
            left a lock.
    """
    check_engine(config, world.size, world.device)
    normalizer(config.evaluation.normalizer, config.train_data.target_text)
    refuse_missing_trackers(config.metrics.trackers)
    if config.engine.deepspeed is not None:
        refuse_old_locks()


def check_before_loading(config: RunConfig, world: World) -> None:
    """Refuse what `check_settings` refuses, and a folder in which the run cannot write.

    Raises:
        UserError: also if `run_dir` cannot be written, is in use, or is another folder on some ranks.
    """
    check_settings(config, world)
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
        selection=config.evaluation.selection,
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


def changes_of(
    config: RunConfig,
    saved_step: int | None,
    num_steps: int,
    test_sets: Mapping[str, str],
    allow_changed: Sequence[str],
) -> list[Change]:
    """What has changed since the checkpoint from which the run resumes; nothing without a checkpoint.

    Raises:
        UserError: the run is past its last step, or results could not be compared.
    """
    if saved_step is None:
        return []
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


def _stopped(config: RunConfig, progress: TrainProgress, metrics_log: MetricsLog, reason: StopReason) -> int:
    why = "by a signal" if reason == "signal" else f"before the end of `max_run_hours` ({config.max_run_hours:g})"
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
