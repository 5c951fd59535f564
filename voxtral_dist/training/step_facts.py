"""What ranks tell each other about their micro-batches of a step, before they compute with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from voxtral_dist.data.examples.micro_batch import MicroBatch
from voxtral_dist.model.flops import BatchShape, TrainingFlops

_NUM_TOTALS = 7


@dataclass(frozen=True)
class StepFacts:
    """The micro-batches of a step: those of one rank, or of all ranks.

    num_windows, num_positions, num_examples: of each micro-batch, positions with padding; maxima over ranks. All others
    are sums over micro-batches and ranks.
    """

    num_windows: tuple[int, ...]
    num_positions: tuple[int, ...]
    num_examples: tuple[int, ...]
    num_target_tokens: int
    num_tokens: int
    model_flops: float
    audio_seconds: float
    num_utterances: int
    num_bad_utterances: int
    num_too_long: int

    @classmethod
    def of(cls, micro_batches: Sequence[MicroBatch], flops: TrainingFlops | None) -> StepFacts:
        """The micro-batches of this rank; `flops` counts their operations, None counts none."""
        needed = _needed_shape(micro_batches)
        return cls(
            num_windows=tuple(batch.num_windows for batch in micro_batches),
            num_positions=tuple(batch.input_ids.numel() for batch in micro_batches),
            num_examples=tuple(len(batch.positions_per_example) for batch in micro_batches),
            num_target_tokens=sum(batch.num_target_tokens for batch in micro_batches),
            num_tokens=needed.num_positions,
            model_flops=flops.model(needed) if flops else 0.0,
            audio_seconds=sum(batch.audio_seconds for batch in micro_batches),
            num_utterances=sum(batch.num_utterances for batch in micro_batches),
            num_bad_utterances=sum(len(batch.bad_utterances) for batch in micro_batches),
            num_too_long=sum(bad.is_too_long for batch in micro_batches for bad in batch.bad_utterances),
        )

    def row(self) -> list[float]:
        """The facts as numbers; as many on every rank."""
        return [
            *self.num_windows,
            *self.num_positions,
            *self.num_examples,
            self.num_target_tokens,
            self.num_tokens,
            self.model_flops,
            self.audio_seconds,
            self.num_utterances,
            self.num_bad_utterances,
            self.num_too_long,
        ]

    @classmethod
    def over_ranks(cls, rows: Sequence[Sequence[float]]) -> StepFacts:
        """The facts of all ranks, from the row of each."""
        columns = list(zip(*rows, strict=True))
        sizes = [int(max(column)) for column in columns[:-_NUM_TOTALS]]
        targets, tokens, flops, seconds, used, bad, too_long = map(sum, columns[-_NUM_TOTALS:])
        count = len(sizes) // 3
        return cls(
            num_windows=tuple(sizes[:count]),
            num_positions=tuple(sizes[count : 2 * count]),
            num_examples=tuple(sizes[2 * count :]),
            num_target_tokens=int(targets),
            num_tokens=int(tokens),
            model_flops=flops,
            audio_seconds=seconds,
            num_utterances=int(used),
            num_bad_utterances=int(bad),
            num_too_long=int(too_long),
        )


def _needed_shape(micro_batches: Sequence[MicroBatch]) -> BatchShape:
    """The shape of a rank's step for model FLOPs: without padding and without micro-batches of weight zero."""
    shapes = (
        BatchShape.needed(batch.num_windows, batch.positions_per_example, batch.num_target_tokens)
        for batch in micro_batches
        if batch.num_utterances
    )
    return sum(shapes, BatchShape())
