"""One optimizer update over all ranks: micro-batches, loss, gradient, and what was measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from voxtral_dist.checkpoints.progress import GuardState, TrainProgress
from voxtral_dist.config import OptimizerConfig
from voxtral_dist.data.examples.dividing import divided
from voxtral_dist.data.examples.micro_batch import MicroBatch
from voxtral_dist.data.loader import StepBatches
from voxtral_dist.distributed.collectives import RankRows
from voxtral_dist.distributed.standing import stand
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.engine import Engine, StepUpdate
from voxtral_dist.engine.optim import learning_rate
from voxtral_dist.model.encoder import num_chunks
from voxtral_dist.model.flops import TrainingFlops
from voxtral_dist.training.ahead import MicroBatchesAhead
from voxtral_dist.training.guards import Guards
from voxtral_dist.training.incidents import Incident, finite_or_none, investigate
from voxtral_dist.training.memory_limits import MemoryLimits
from voxtral_dist.training.requests import Requests
from voxtral_dist.training.step_exchange import StepExchange
from voxtral_dist.training.step_facts import StepFacts
from voxtral_dist.training.step_metrics import StepMetrics


@dataclass(frozen=True)
class StepResult:
    """What one update measured over all ranks, and what all ranks agree on after it.

    agreed: the requests of any rank. guards: what they remember after it. incident: what was unusual about it.
    """

    metrics: StepMetrics
    num_utterances: int
    num_bad_utterances: int
    num_too_long: int
    agreed: Requests
    guards: GuardState = field(default_factory=GuardState)
    incident: Incident | None = None

    def advance(self, progress: TrainProgress) -> TrainProgress:
        """The progress of the run after this update."""
        return TrainProgress(
            step=progress.step + 1,
            num_utterances_seen=progress.num_utterances_seen + self.num_utterances,
            num_bad_utterances=progress.num_bad_utterances + self.num_bad_utterances,
            num_too_long=progress.num_too_long + self.num_too_long,
            audio_seconds=progress.audio_seconds + self.metrics.audio_seconds,
            train_seconds=progress.train_seconds + self.metrics.step_seconds,
            guards=self.guards,
        )


@dataclass
class TrainStep:
    """Updates in which every target token of the global batch has the same weight.

    optimizer, num_steps: the learning rate of each step, which follows a schedule over the whole run.
    seed: of dropout.
    encoder_windows_per_chunk, mlp_chunk_tokens: as in section `model`.
    ahead: brings micro-batches to the device.
    flops: counts the model's operations; None counts none.
    guards: judge updates.
    limits: divide micro-batches that would not fit.
    newest_checkpoint: names the newest checkpoint where the loss is not finite; all ranks call it together.
    """

    engine: Engine
    optimizer: OptimizerConfig
    num_steps: int
    seed: int
    encoder_windows_per_chunk: int
    mlp_chunk_tokens: int | None
    world: World
    ahead: MicroBatchesAhead
    guards: Guards
    limits: MemoryLimits
    flops: TrainingFlops | None = None
    newest_checkpoint: Callable[[], str | None] = lambda: None
    # The micro-batches of the next step, and what all ranks have told each other about it.
    _upcoming: tuple[Sequence[MicroBatch], StepFacts] | None = field(default=None, init=False)

    def run(self, batches: StepBatches, requests: Callable[[], Requests] = Requests) -> StepResult:
        """Make one update. All ranks call it together, each with its own micro-batches.

        Args:
            batches: the micro-batches of this rank, as many as on every other rank.
            requests: what this rank asks for after the step; called while the device computes.

        Raises:
            UserError: the loss or the gradient is not finite, once too often in a row. All ranks raise it, and none of
                them saves this step.
            RetryError: a micro-batch of this rank did not fit into the memory of its GPU.
        """
        started = time.monotonic()
        facts = self._facts_of(batches)
        num_parts = list(map(self.limits.num_parts, facts.num_examples, facts.num_positions))
        parts = self._parts(self._with_equal_chunks(batches.micro_batches, facts), num_parts)
        losses = self._backward(parts, batches.step, facts.num_target_tokens)
        upcoming = StepFacts.of(batches.upcoming.micro_batches, self.flops) if batches.upcoming else None
        exchange = StepExchange(losses, requests(), batches.waiting_seconds, upcoming, self.world)
        rate = learning_rate(self.optimizer, batches.step, self.num_steps)
        update = self.engine.step(rate, lambda norm: self.guards.accepts(exchange.told.loss_sum, norm))
        told = exchange.told
        loss = told.loss_sum / max(1, facts.num_target_tokens)
        incident = self._judged(loss, update, [part.batch for part in parts], losses, batches.step)
        if batches.upcoming is not None and told.upcoming is not None:
            self._upcoming = batches.upcoming.micro_batches, told.upcoming
        metrics = StepMetrics(
            loss=finite_or_none(loss),
            num_target_tokens=facts.num_target_tokens,
            num_tokens=facts.num_tokens,
            audio_seconds=facts.audio_seconds,
            model_flops=facts.model_flops,
            learning_rate=update.learning_rate,
            grad_norm=None if update.is_skipped else finite_or_none(update.grad_norm),
            step_seconds=batches.waiting_seconds + time.monotonic() - started,
            waiting_seconds=told.waiting_seconds,
            memory_gigabytes=told.memory_gigabytes,
            num_skipped=self.guards.state.num_skipped,
            num_divided=sum(number > 1 for number in num_parts),
        )
        return StepResult(
            metrics=metrics,
            num_utterances=facts.num_utterances,
            num_bad_utterances=facts.num_bad_utterances,
            num_too_long=facts.num_too_long,
            agreed=told.requests,
            guards=self.guards.state,
            incident=incident,
        )

    def _judged(
        self, loss: float, update: StepUpdate, micro_batches: Sequence[MicroBatch], losses: Sequence[Tensor], step: int
    ) -> Incident | None:
        """What was unusual about an update, if anything was.

        Raises:
            UserError: the run ends with it.
        """
        judgement = self.guards.judge(loss, update)
        if judgement.reason is None:
            return None
        incident = investigate(judgement, step, loss, update.grad_norm, micro_batches, losses, self.engine, self.world)
        if incident.weights or (judgement.reason != "spike" and self.guards.must_end):
            raise incident.refusal(self.guards.state.num_in_a_row, self.newest_checkpoint())
        return incident

    def _facts_of(self, batches: StepBatches) -> StepFacts:
        """What all ranks know about a step: they have told each other during the one before, or do it now."""
        told, self._upcoming = self._upcoming, None
        if told is not None and told[0] is batches.micro_batches:
            return told[1]
        return StepFacts.over_ranks(RankRows(StepFacts.of(batches.micro_batches, self.flops).row(), self.world).read())

    def _with_equal_chunks(self, micro_batches: Sequence[MicroBatch], facts: StepFacts) -> list[MicroBatch]:
        """Give each micro-batch as many chunks as the rank needs that has most windows, or most positions, in it.

        Engines that shard weights exchange them in every chunk, so all ranks must run equally many.
        """
        tokens = self.mlp_chunk_tokens
        return [
            replace(
                batch,
                num_encoder_chunks=num_chunks(num_windows, self.encoder_windows_per_chunk),
                num_mlp_chunks=num_chunks(num_positions, tokens) if tokens else None,
            )
            for batch, num_windows, num_positions in zip(
                micro_batches, facts.num_windows, facts.num_positions, strict=True
            )
        ]

    def _parts(self, micro_batches: Sequence[MicroBatch], num_parts: Sequence[int]) -> list[_Part]:
        """Divide micro-batches as all ranks have agreed, in order."""
        return [
            _Part(batch, slot=self.world.rank + number * self.world.size, number=part)
            for number, (whole, count) in enumerate(zip(micro_batches, num_parts, strict=True))
            for part, batch in enumerate(divided(whole, count))
        ]

    def _backward(self, parts: Sequence[_Part], step: int, num_target_tokens: int) -> list[Tensor]:
        """Accumulate the gradient of the mean loss. Returns the summed loss of each part, on the device."""
        losses: list[Tensor] = []
        try:
            for number, batch in enumerate(self.ahead([part.batch for part in parts])):
                part = parts[number]
                stand("step", step, part.slot, batch.keys)
                # Dropout depends on the position in the run, and not on what ran before.
                torch.manual_seed(_dropout_seed(self.seed, step, part.slot) + part.number)
                is_last = number == len(parts) - 1
                losses.append(self.engine.backward(batch, max(1, num_target_tokens), is_last=is_last))
        except torch.OutOfMemoryError as error:
            self.limits.learn(parts[len(losses)].batch, step, error)
            raise
        return losses


class _Part(NamedTuple):
    """A micro-batch or a part of one: the place of the whole in its step, and its own place in the whole."""

    batch: MicroBatch
    slot: int
    number: int


def _dropout_seed(seed: int, step: int, slot: int) -> int:
    # Distinct odd multipliers keep (seed, step, slot) apart; torch spreads the bits.
    return (seed * 1_000_003 + step * 65_537 + slot) % 2**63
