"""The steps of a run, with what follows each: records, checkpoints, evaluations, and requests to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from voxtral_dist.checkpoints.progress import TrainProgress
from voxtral_dist.data.loader import StepBatches
from voxtral_dist.distributed.collectives import first_over_ranks, max_over_ranks
from voxtral_dist.distributed.standing import data_waits
from voxtral_dist.distributed.world import World
from voxtral_dist.errors import ReadError
from voxtral_dist.training.bad_utterances import BadUtteranceLimits
from voxtral_dist.training.checkpoint_selector import CheckpointSelector
from voxtral_dist.training.evaluator import Evaluator
from voxtral_dist.training.metrics_log import MetricsLog
from voxtral_dist.training.requests import Requests
from voxtral_dist.training.saver import Saver
from voxtral_dist.training.selection import Verdict
from voxtral_dist.training.signals import StopRequest
from voxtral_dist.training.step import StepResult, TrainStep
from voxtral_dist.training.stragglers import Stragglers
from voxtral_dist.training.time_limit import Part, TimeLimit

# Why a run stops before its end: a signal, `max_run_hours`, or shards that cannot be read.
StopReason = Literal["signal", "time", "storage"]


@dataclass
class TrainingLoop:
    """Trains from `progress` to the last step. All ranks run it together, and agree on all that it decides.

    verdict: on the evaluations so far.
    """

    step: TrainStep
    evaluator: Evaluator
    selector: CheckpointSelector
    saver: Saver
    bad_utterances: BadUtteranceLimits
    stragglers: Stragglers
    metrics_log: MetricsLog
    time_limit: TimeLimit
    stop: StopRequest
    world: World
    progress: TrainProgress
    verdict: Verdict = field(default_factory=Verdict)
    # Why this rank cannot read its next step.
    _read_error: str | None = field(default=None, init=False)

    def run(self, steps: Iterable[StepBatches]) -> StopReason | None:
        """Train until the last step, or until the selection ends the run; None then.

        Returns:
            Why the run stopped before. Its state is saved, or was saved before an evaluation that was stopped.

        Raises:
            ReadError: on all ranks; one cannot read its next step, because the storage of the shards fails.
        """
        reason = self._run(steps)
        if reason is not None:
            self.saver.finish_uploads()
        if reason == "storage":
            unread = first_over_ranks(self._read_error, self.world)
            raise ReadError(f"Stopped at step {self.progress.step}, which is saved: {unread}")
        return reason

    def _run(self, steps: Iterable[StepBatches]) -> StopReason | None:
        if self.evaluator.is_owed(self.progress.step) and not self._is_evaluated():
            return "signal"
        self.verdict = self.selector.select(self.progress.step)
        for batches in () if self.verdict.must_stop else data_waits(steps, self.progress.step):
            reason = self._advance(batches)
            if reason is not None or self.verdict.must_stop:
                return reason
        return None

    @property
    def _is_at_end(self) -> bool:
        return self.progress.step == self.step.num_steps

    def _advance(self, batches: StepBatches) -> StopReason | None:
        """Make one update, and what is due after it."""
        self._read_error = None if batches.upcoming is None else batches.upcoming.read_error
        result = self.step.run(batches, self._requests(self.progress.step + 1))
        self.progress = result.advance(self.progress)
        self._record(result, batches)
        is_evaluated = self.evaluator.is_due(self.progress.step)
        agreed = result.agreed
        must_stop = agreed.stop_in_time or agreed.cannot_read or (agreed.stop and not self._is_at_end)
        self.stragglers.after_step(self.progress.step, batches.waiting_seconds)
        self.saver.after_step(self.progress, agreed, is_awaited=self._is_at_end or is_evaluated or must_stop)
        if must_stop:
            return "signal" if agreed.stop else "time" if agreed.stop_in_time else "storage"
        return self._evaluate() if is_evaluated else None

    def _record(self, result: StepResult, batches: StepBatches) -> None:
        self.time_limit.record("step", result.metrics.step_seconds)
        self.metrics_log.train_step(self.progress.step, result.metrics)
        self.metrics_log.incident(self.progress.step, result.incident)
        self.bad_utterances.check(self.progress, batches.micro_batches, result)

    def _is_evaluated(self) -> bool:
        """Evaluate this step; false where a signal stopped it."""
        with self.time_limit.measuring("evaluation"):
            return self.evaluator.evaluate(self.progress.step, lambda: self.stop.requested)

    def _evaluate(self) -> StopReason | None:
        if not self._is_evaluated():
            return "signal"
        self.verdict = self.selector.select(self.progress.step)
        if self.verdict.must_stop or self._is_at_end:
            return None
        # The state is saved already: one more step would have to be saved again.
        is_short = self.time_limit.is_too_short_for("step", "save", *self.saver.owed_uploads())
        by_signal, in_time = max_over_ranks([int(self.stop.requested), int(is_short)], self.world)
        if by_signal:
            return "signal"
        return "time" if in_time else None

    def _requests(self, step: int) -> Callable[[], Requests]:
        """What this rank asks for after its next update, which will be the run's number `step`.

        Time is looked at before the update; signals, and what a thread has written, when the ranks tell each other.
        """
        # A run that stops before an evaluation begins with it when it resumes.
        following: tuple[Part, ...] = ("evaluation",) if self.evaluator.is_due(step) else ("step",)
        if step == self.step.num_steps:
            # An export takes about as long as a save.
            following = ("evaluation", "save")
        by_clock = Requests(
            stop_in_time=self.time_limit.is_too_short_for("step", "save", *following, *self.saver.owed_uploads()),
            save=self.time_limit.needs_a_save(),
            save_in_background=self.saver.is_time(),
            cannot_read=self._read_error is not None,
        )
        return lambda: replace(by_clock, stop=self.stop.requested, is_written=self.saver.is_written())
