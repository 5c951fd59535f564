"""Limits on unusable utterances: each one is recorded, and a run on broken data ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

from voxtral_dist.checkpoints.progress import TrainProgress
from voxtral_dist.config import TrainDataConfig
from voxtral_dist.data.examples.micro_batch import MicroBatch
from voxtral_dist.distributed.collectives import gather_on_first
from voxtral_dist.distributed.world import World
from voxtral_dist.errors import UserError
from voxtral_dist.output.counting import counted
from voxtral_dist.training.metrics_log import MetricsLog
from voxtral_dist.training.step import StepResult

# `max_bad_fraction` means little before this many utterances were seen.
_MIN_UTTERANCES_FOR_FRACTION = 200


class BadUtteranceLimits:
    """Records every unusable utterance, and ends a run that has too many of them."""

    def __init__(
        self,
        config: TrainDataConfig,
        metrics_log: MetricsLog,
        world: World,
        newest_checkpoint: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Count from zero.

        Args:
            config: the limits.
            metrics_log: records each.
            world: all ranks.
            newest_checkpoint: completes the checkpoint under way, and names the newest one; all ranks call it together
                before the run ends.
        """
        self._config = config
        self._metrics_log = metrics_log
        self._world = world
        self._newest_checkpoint = newest_checkpoint
        self._num_in_a_row = 0

    def check(self, progress: TrainProgress, micro_batches: Sequence[MicroBatch], result: StepResult) -> None:
        """Record what this step skipped, and refuse to continue above a limit.

        All ranks call it together. They count alike, so that they end together.

        Raises:
            UserError: a limit of `train_data` is exceeded.
        """
        self._num_in_a_row = 0 if result.num_utterances else self._num_in_a_row + result.num_bad_utterances
        if result.num_bad_utterances == 0:
            return
        self._record(progress.step, micro_batches)
        exceeded = self._exceeded(progress, result.num_too_long)
        if exceeded is not None:
            newest = self._newest_checkpoint()
            raise UserError(f"{exceeded} The newest checkpoint is {newest}." if newest else exceeded)

    def _exceeded(self, progress: TrainProgress, num_too_long: int) -> str | None:
        """A message about the first limit that is exceeded; None if none is."""
        return self._too_long(progress.step, num_too_long) or self._fraction(progress) or self._in_a_row()

    def _record(self, step: int, micro_batches: Sequence[MicroBatch]) -> None:
        local = [bad for batch in micro_batches for bad in batch.bad_utterances]
        for bad in (bad for of_rank in gather_on_first(local, self._world) for bad in of_rank):
            self._metrics_log.write("event", step, {"event": "bad_utterance", **asdict(bad)})
            self._metrics_log.say(f"step {step}: skipped the utterance {bad.key} of {bad.shard}: it {bad.reason}")

    def _too_long(self, step: int, num_too_long: int) -> str | None:
        if not num_too_long or self._config.too_long != "refuse":
            return None
        return (
            f"`train_data.too_long` is `refuse`, but step {step} has {counted(num_too_long, 'utterance')} too long "
            "for it: metrics.jsonl names each. Raise `max_target_tokens`, cut the recordings, or set `too_long: skip`."
        )

    def _fraction(self, progress: TrainProgress) -> str | None:
        # An utterance that is too long is skipped as configured, and is no sign of broken data.
        num_broken = progress.num_bad_utterances - progress.num_too_long
        num_seen = progress.num_utterances_seen + num_broken
        if num_seen < _MIN_UTTERANCES_FOR_FRACTION or num_broken / num_seen <= self._config.max_bad_fraction:
            return None
        return (
            f"{num_broken} of {counted(num_seen, 'utterance')} were unusable, more than `train_data.max_bad_fraction` "
            f"({self._config.max_bad_fraction}) allows: metrics.jsonl names each."
        )

    def _in_a_row(self) -> str | None:
        if self._num_in_a_row <= self._config.max_bad_in_a_row:
            return None
        return (
            f"{counted(self._num_in_a_row, 'unusable utterance')} in a row, more than `train_data.max_bad_in_a_row` "
            f"({self._config.max_bad_in_a_row}) allows: metrics.jsonl names each."
        )
