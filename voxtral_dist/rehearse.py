"""Rehearsals of a run: its start, or updates on one batch. Neither writes into `run_dir`."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from voxtral_dist.checkpoints.directory import newest_intact_step
from voxtral_dist.config import RunConfig
from voxtral_dist.data.examples.micro_batch import MicroBatch
from voxtral_dist.data.label_view import label_lines
from voxtral_dist.data.loader import StepBatches
from voxtral_dist.distributed.collectives import computed_on_first, from_first_rank, max_over_ranks, wait_for_all
from voxtral_dist.distributed.world import World, joined_world
from voxtral_dist.engine.zero.settings import nvme_folder
from voxtral_dist.errors import RankError, RetryError, UserError
from voxtral_dist.estimate.checkpointing import estimator_with_chosen_checkpointing, machine_of
from voxtral_dist.estimate.estimator import Estimator, Machine
from voxtral_dist.estimate.run_memory import RunMemory
from voxtral_dist.estimate.sharding import configured_sharding
from voxtral_dist.files import refuse_uncreatable
from voxtral_dist.output.console import say
from voxtral_dist.output.counting import counted
from voxtral_dist.train import EXIT_STOPPED, Prepared, changes_of, check_settings, prepare
from voxtral_dist.training.announcement import data_lines, training_line
from voxtral_dist.training.memory_limits import MemoryLimits
from voxtral_dist.training.requests import Requests
from voxtral_dist.training.same_run import refuse_different_runs
from voxtral_dist.training.signals import StopRequest, stop_signals
from voxtral_dist.training.step import TrainStep
from voxtral_dist.training.step_metrics import StepMetrics

# The exit code where one batch was not learned.
EXIT_NOT_LEARNED = 1
# A batch is learned when its loss is this fraction of the first one.
LEARNED_FRACTION = 0.1
_NUM_EXAMPLES = 3
_STEPS_BETWEEN_LINES = 10


def dry_run(config: RunConfig, allow_changed: Sequence[str] = ()) -> int:
    """Do all that a run does before its first update, on all ranks, and print what it found.

    Data are indexed and planned, the micro-batches of the first step are made, and the model is loaded and sharded.

    Args:
        config: of the run.
        allow_changed: as for `train`.

    Returns:
        0, or `EXIT_STOPPED` where a signal ended it.

    Raises:
        UserError: what a run would be refused for.
    """
    with _joined(config) as (stop, world), _without_traces(config, world) as scratch:
        saved_step = from_first_rank(_saved_step(config.run_dir) if world.is_first else None, world)
        data = prepare(scratch, world)
        changes = changes_of(config, saved_step, data.num_steps, data.test_set_fingerprints, allow_changed)
        lines = [*data_lines(config, data.loader, world.size), *data.notes, *_memory_lines(config, world)]
        with data.loader.starting_at(saved_step or 0) as steps:
            lines += _example_lines(steps, data)
        _say(lines, world)
        if max_over_ranks([int(stop.requested)], world)[0]:
            return EXIT_STOPPED
        engine = data.build_engine(world)
        lines = list(engine.parameter_table())
        if saved_step is not None:
            lines += [f"The run would resume from its checkpoint of step {saved_step}.", *map(str, changes)]
        lines.append(training_line(data.chosen, data.loader, saved_step or 0, world))
        lines.append(f"Dry run: all is ready, and nothing was written to {config.run_dir}.")
        _say(lines, world)
    return 0


def overfit_batch(config: RunConfig, most_steps: int = 100) -> int:
    """Train on the batch of the first step alone, at the peak learning rate, until its loss has fallen to a tenth.

    A model, an optimizer and labels that are right learn a batch by heart; where they do not, a run is in vain.

    Args:
        config: of the run. Its schedule and label smoothing, which has a loss of its own, are left out.
        most_steps: updates at most.

    Returns:
        0 if the batch was learned, else `EXIT_NOT_LEARNED`; `EXIT_STOPPED` where a signal ended it.

    Raises:
        UserError: what a run would be refused for.
    """
    with _joined(config) as (stop, world), _without_traces(config, world) as scratch:
        constant = scratch.optimizer.model_copy(update={"schedule": "constant", "warmup_steps": 0})
        plain = scratch.model.model_copy(update={"label_smoothing": 0.0})
        data = prepare(scratch.model_copy(update={"optimizer": constant, "model": plain}), world)
        with data.loader.starting_at(0) as steps:
            batches = replace(_first_step(steps, data.num_steps), upcoming=None)
        engine = data.build_engine(world)
        step = data.build_step(engine, world, limits=MemoryLimits(data.config, world))
        try:
            losses = _losses(step, batches, most_steps, stop, world)
        except RetryError as error:
            raise RankError(
                f"`--overfit-batch`: one batch does not fit into the memory of rank {world.rank}'s GPU: use smaller "
                "micro-batches, and more of them (`train_data.slots_per_step`)."
            ) from error
        if losses is None:
            return EXIT_STOPPED
        is_learned, line = _verdict(losses, most_steps, constant.learning_rate)
        _say([line, f"Nothing was written to {config.run_dir}."], world)
    return 0 if is_learned else EXIT_NOT_LEARNED


@contextmanager
def _joined(config: RunConfig) -> Iterator[tuple[StopRequest, World]]:
    with stop_signals() as stop, joined_world(*config.distributed.timeouts) as world:
        refuse_different_runs(config, (), world)
        check_settings(config, world)
        refuse_uncreatable("run_dir", config.run_dir)
        yield stop, world


@contextmanager
def _without_traces(config: RunConfig, world: World) -> Iterator[RunConfig]:
    """The configuration with a folder of temporary files in the place of `run_dir`, which is removed at the end."""
    folder = Path(tempfile.gettempdir()) / from_first_rank(f"voxtral-dist-{uuid.uuid4().hex}", world)
    try:
        yield config.model_copy(update={"run_dir": folder})
        # Other ranks may still use what is in it.
        wait_for_all(world)
    finally:
        for path in filter(None, (folder, nvme_folder(config.engine, folder))):
            shutil.rmtree(path, ignore_errors=True)


def _saved_step(run_dir: Path) -> int | None:
    return newest_intact_step(run_dir) if run_dir.is_dir() else None


def _first_step(steps: Iterator[StepBatches], num_steps: int) -> StepBatches:
    batches = next(steps, None)
    if batches is None:
        raise UserError(f"The run has made its {counted(num_steps, 'step')}: there is no next one.")
    return batches


def _memory_lines(config: RunConfig, world: World) -> list[str]:
    """The memory that `plan` estimates for the machine that this is."""
    machine = machine_of(world)
    return computed_on_first(lambda: list(_estimated_memory(config, machine).lines()), world)


def _estimated_memory(config: RunConfig, machine: Machine) -> RunMemory:
    sharding = configured_sharding(config.engine, machine.num_gpus)
    estimator, checkpointing = estimator_with_chosen_checkpointing(Estimator(config, machine), sharding)
    return RunMemory.of(estimator, sharding, checkpointing)


def _example_lines(steps: Iterator[StepBatches], data: Prepared) -> list[str]:
    """The next examples of this rank, and what of the utterances before them cannot be used."""
    batches = list(_first_step(steps, data.num_steps).micro_batches)
    while sum(map(_num_examples, batches)) < _NUM_EXAMPLES and (more := next(steps, None)) is not None:
        batches += more.micro_batches
    examples = [(batch, number) for batch in batches for number in range(_num_examples(batch))]
    lines = []
    for place, (batch, number) in enumerate(examples[:_NUM_EXAMPLES], 1):
        summary, *tokens = label_lines(batch, number, data.prompts)
        lines += [f"example {place} of rank 0: {summary}", *tokens]
    for bad in (bad for batch in batches for bad in batch.bad_utterances):
        lines.append(f"The utterance {bad.key} of {bad.shard} would be skipped: it {bad.reason}")
    return lines


def _num_examples(batch: MicroBatch) -> int:
    """Examples of a micro-batch; none where it only keeps a rank in step."""
    return len(batch.keys) if batch.num_utterances else 0


def _losses(
    step: TrainStep, batches: StepBatches, most_steps: int, stop: StopRequest, world: World
) -> list[float] | None:
    """The loss before each update on the same batch, until it has fallen; None where a signal asked to stop."""
    losses: list[float] = []
    for number in range(most_steps):
        result = step.run(replace(batches, step=number), lambda: Requests(stop=stop.requested))
        if result.agreed.stop:
            return None
        if number == 0 and not result.metrics.num_target_tokens:
            raise UserError("The first step has no usable utterance: look at the data by `--dry-run`.")
        losses += [] if result.metrics.loss is None else [result.metrics.loss]
        is_last = _is_learned(losses) or number == most_steps - 1
        if number % _STEPS_BETWEEN_LINES == 0 or is_last:
            _say([_step_line(number, result.metrics)], world)
        if is_last:
            break
    return losses


def _step_line(number: int, metrics: StepMetrics) -> str:
    loss = "not finite" if metrics.loss is None else f"{metrics.loss:.4f}"
    norm = "not finite" if metrics.grad_norm is None else f"{metrics.grad_norm:.3g}"
    targets = counted(metrics.num_target_tokens, "target")
    return f"update {number + 1}: loss {loss} over {targets}, gradient norm {norm}, {metrics.memory_gigabytes:.1f} GB"


def _is_learned(losses: Sequence[float]) -> bool:
    return bool(losses) and losses[-1] <= LEARNED_FRACTION * losses[0]


def _verdict(losses: Sequence[float], most_steps: int, learning_rate: float) -> tuple[bool, str]:
    """Whether the batch was learned, in a sentence."""
    if not losses:
        return False, "Not learned: no loss was finite. Lower `optimizer.learning_rate`, and look at the data."
    fell = (
        f"the loss of one batch {'fell' if losses[-1] < losses[0] else 'went'} from {losses[0]:.4f} to {losses[-1]:.4f}"
    )
    how = f"{counted(len(losses), 'update')} at the learning rate {learning_rate:g}"
    if _is_learned(losses):
        return True, f"Learned: {fell} in {how}."
    return False, (
        f"Not learned: {fell} in {how}, and not to a tenth. "
        f"Try more updates (`--overfit-batch {3 * most_steps}`) or another `optimizer.learning_rate`; if that is no "
        "help, look at the labels (`--dry-run`) and at what is trained (`trainable`)."
    )


def _say(lines: Sequence[str], world: World) -> None:
    if world.is_first:
        for line in lines:
            say(line)
