"""One optimizer update over all ranks: micro-batches, loss, gradient, and what was measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from voxtral_dist.checkpoints.progress import TrainProgress
from voxtral_dist.config import OptimizerConfig
from voxtral_dist.data.examples.micro_batch import MicroBatch
from voxtral_dist.data.loader import StepBatches
from voxtral_dist.distributed.collectives import max_over_ranks, sum_over_ranks, sum_tensor_over_ranks
from voxtral_dist.distributed.devices import peak_memory_bytes
from voxtral_dist.distributed.standing import stand
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.engine import Engine
from voxtral_dist.engine.optim import learning_rate
from voxtral_dist.model.encoder import num_chunks
from voxtral_dist.model.flops import BatchShape, TrainingFlops
from voxtral_dist.training.ahead import MicroBatchesAhead
from voxtral_dist.training.not_finite import refuse_loss_not_finite, refuse_norm_not_finite
from voxtral_dist.training.step_metrics import StepMetrics


@dataclass(frozen=True)
class Requests:
    """What a rank asks for after a step; all ranks do what one of them asks for.

    stop: to stop, because a signal asked it. stop_in_time: to stop, because `max_run_hours` are nearly over. save: to
    save, and to wait for it. save_in_background: to save by `every_seconds`. is_written: to complete the checkpoint
    under way; this is done when all ranks ask for it.
    """

    stop: bool = False
    stop_in_time: bool = False
    save: bool = False
    save_in_background: bool = False
    is_written: bool = False


@dataclass(frozen=True)
class StepResult:
    """What one update measured over all ranks, and what all ranks agree on after it.

    agreed: the requests of any rank.
    """

    metrics: StepMetrics
    num_utterances: int
    num_bad_utterances: int
    num_too_long: int
    agreed: Requests

    def advance(self, progress: TrainProgress) -> TrainProgress:
        """The progress of the run after this update."""
        return TrainProgress(
            step=progress.step + 1,
            num_utterances_seen=progress.num_utterances_seen + self.num_utterances,
            num_bad_utterances=progress.num_bad_utterances + self.num_bad_utterances,
            num_too_long=progress.num_too_long + self.num_too_long,
            audio_seconds=progress.audio_seconds + self.metrics.audio_seconds,
            train_seconds=progress.train_seconds + self.metrics.step_seconds,
        )


@dataclass(frozen=True)
class TrainStep:
    """Updates in which every target token of the global batch has the same weight.

    optimizer, num_steps: the learning rate of each step, which follows a schedule over the whole run.
    seed: of dropout.
    encoder_windows_per_chunk, mlp_chunk_tokens: as in section `model`.
    ahead: brings micro-batches to the device.
    flops: counts the model's operations; None counts none.
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
    flops: TrainingFlops | None = None
    newest_checkpoint: Callable[[], str | None] = lambda: None

    def run(self, batches: StepBatches, requests: Requests | None = None) -> StepResult:
        """Make one update. All ranks call it together, each with its own micro-batches.

        Args:
            batches: the micro-batches of this rank, as many as on every other rank.
            requests: what this rank asks for after the step.

        Raises:
            UserError: the loss or the gradient is not finite. All ranks raise it, and none of them saves this step.
        """
        started = time.monotonic()
        maxima = RankMaxima.measure(batches, self.world)
        micro_batches = self._with_equal_chunks(batches.micro_batches, maxima)
        totals = _Totals.of(micro_batches, self.flops, requests or Requests()).over_ranks(self.world)
        loss, losses = self._backward(micro_batches, batches.step, int(totals.num_target_tokens))
        refuse_loss_not_finite(
            loss, batches.step, micro_batches, losses, self.engine, self.newest_checkpoint, self.world
        )
        update = self.engine.step(learning_rate(self.optimizer, batches.step, self.num_steps))
        if not update.is_skipped:
            refuse_norm_not_finite(
                update.grad_norm, loss, batches.step, micro_batches, self.newest_checkpoint, self.world
            )
        metrics = StepMetrics(
            loss=loss,
            num_target_tokens=int(totals.num_target_tokens),
            num_tokens=int(totals.num_tokens),
            audio_seconds=totals.audio_seconds,
            model_flops=totals.model_flops,
            learning_rate=update.learning_rate,
            grad_norm=None if update.is_skipped else update.grad_norm,
            step_seconds=batches.waiting_seconds + time.monotonic() - started,
            waiting_seconds=maxima.waiting_seconds,
            memory_gigabytes=maxima.memory_gigabytes,
        )
        return StepResult(
            metrics=metrics,
            num_utterances=int(totals.num_utterances),
            num_bad_utterances=int(totals.num_bad_utterances),
            num_too_long=int(totals.num_too_long),
            agreed=Requests(
                stop=totals.num_stops > 0,
                stop_in_time=totals.num_stops_in_time > 0,
                save=totals.num_saves > 0,
                save_in_background=totals.num_saves_in_background > 0,
                is_written=totals.num_written == self.world.size,
            ),
        )

    def _with_equal_chunks(self, micro_batches: Sequence[MicroBatch], maxima: RankMaxima) -> list[MicroBatch]:
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
                micro_batches, maxima.num_windows, maxima.num_positions, strict=True
            )
        ]

    def _backward(
        self, micro_batches: Sequence[MicroBatch], step: int, num_target_tokens: int
    ) -> tuple[float, list[torch.Tensor]]:
        """Accumulate the gradient of the mean loss.

        The device is waited for only once, for the sum.

        Returns:
            The mean over the target tokens of all ranks, and the summed loss of each micro-batch, on the device.
        """
        losses = []
        for number, batch in enumerate(self.ahead(micro_batches)):
            # Dropout depends on the position in the run, and not on what ran before.
            stand("step", step, self.world.rank + number * self.world.size, batch.keys)
            torch.manual_seed(_dropout_seed(self.seed, step, self.world.rank + number * self.world.size))
            is_last = number == len(micro_batches) - 1
            losses.append(self.engine.backward(batch, max(1, num_target_tokens), is_last=is_last))
        total = torch.stack(losses).sum().to(torch.float64)
        sum_tensor_over_ranks(total, self.world)
        return float(total) / max(1, num_target_tokens), losses


@dataclass(frozen=True)
class RankMaxima:
    """Maximum over ranks: windows and padded positions of each micro-batch, the wait for data, and the peak memory."""

    num_windows: tuple[int, ...]
    num_positions: tuple[int, ...]
    waiting_seconds: float
    memory_gigabytes: float

    @classmethod
    def measure(cls, batches: StepBatches, world: World) -> RankMaxima:
        """Exchange all of it at once."""
        *sizes, microseconds, num_bytes = max_over_ranks(
            [
                *(batch.num_windows for batch in batches.micro_batches),
                *(batch.input_ids.numel() for batch in batches.micro_batches),
                round(1e6 * batches.waiting_seconds),
                peak_memory_bytes(world.device),
            ],
            world,
        )
        count = len(batches.micro_batches)
        return cls(tuple(sizes[:count]), tuple(sizes[count:]), microseconds / 1e6, num_bytes / 1e9)


class _Totals(NamedTuple):
    """Sums over micro-batches: those of one rank, or of all ranks."""

    num_target_tokens: float
    num_tokens: float
    model_flops: float
    audio_seconds: float
    num_utterances: float
    num_bad_utterances: float
    num_too_long: float
    num_stops: float
    num_stops_in_time: float
    num_saves: float
    num_saves_in_background: float
    num_written: float

    @classmethod
    def of(cls, micro_batches: Sequence[MicroBatch], flops: TrainingFlops | None, requests: Requests) -> _Totals:
        needed = _needed_shape(micro_batches)
        return cls(
            num_target_tokens=sum(batch.num_target_tokens for batch in micro_batches),
            num_tokens=needed.num_positions,
            model_flops=flops.model(needed) if flops else 0.0,
            audio_seconds=sum(batch.audio_seconds for batch in micro_batches),
            num_utterances=sum(batch.num_utterances for batch in micro_batches),
            num_bad_utterances=sum(len(batch.bad_utterances) for batch in micro_batches),
            num_too_long=sum(bad.is_too_long for batch in micro_batches for bad in batch.bad_utterances),
            num_stops=requests.stop,
            num_stops_in_time=requests.stop_in_time,
            num_saves=requests.save,
            num_saves_in_background=requests.save_in_background,
            num_written=requests.is_written,
        )

    def over_ranks(self, world: World) -> _Totals:
        return _Totals(*sum_over_ranks(list(self), world))


def _needed_shape(micro_batches: Sequence[MicroBatch]) -> BatchShape:
    """The shape of a rank's step for model FLOPs: without padding and without micro-batches of weight zero."""
    shapes = (
        BatchShape.needed(batch.num_windows, batch.positions_per_example, batch.num_target_tokens)
        for batch in micro_batches
        if batch.num_utterances
    )
    return sum(shapes, BatchShape())


def _dropout_seed(seed: int, step: int, slot: int) -> int:
    # Distinct odd multipliers keep (seed, step, slot) apart; torch spreads the bits.
    return (seed * 1_000_003 + step * 65_537 + slot) % 2**63
