"""The batches of a test set decoded over ranks: handed out one by one, or in lockstep where weights are sharded.

An error of one rank ends the evaluation on all of them, with its reason: the others learn of it before they begin
another batch, and none waits for results that will not come. Only in the middle of a batch in lockstep nobody can be
told, because the others wait for weights: there the rank ends, and the launcher ends them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from voxtral_dist.data.examples.example import Example
from voxtral_dist.distributed.collectives import from_first_rank, gather_on_first, max_over_ranks, wait_for_all
from voxtral_dist.distributed.task_queue import TaskQueue
from voxtral_dist.distributed.world import World, out_of_memory_reason
from voxtral_dist.errors import RankError, SharedError, UserError
from voxtral_dist.evaluation.batch_decoder import BatchDecoder, DecodedBatch, Hypothesis

log = logging.getLogger(__name__)

Batch = tuple[int, ...]
ReadBatch = Callable[[Batch], list[Example]]


@dataclass(frozen=True)
class Decoded:
    """What one rank decoded: examples with their hypotheses, the loss of their targets, and how long it took."""

    pairs: list[tuple[Example, Hypothesis]]
    loss_sum: float
    num_target_tokens: int
    seconds: float


def decode_batches(
    name: str, batches: Sequence[Batch], read: ReadBatch, decoder: BatchDecoder, with_loss: bool, world: World
) -> Decoded:
    """This rank's part of all batches, each of which one rank decodes. All ranks call it together.

    Args:
        name: of the test set, for sentences.
        batches: the same on all ranks, expensive ones first.
        read: gives the examples of a batch.
        decoder: that decodes them.
        with_loss: whether the loss of targets is measured.
        world: all ranks.

    Raises:
        SharedError: on all ranks, if one of them could not read a batch, or could not decode one by itself.
        RankError: on a rank that could not decode one in lockstep.
    """
    part = _Part(name, batches, read, decoder, with_loss, world)
    # Whoever was still loading is no part of what decoding takes.
    wait_for_all(world)
    started = time.monotonic()
    failure = part.decode()
    seconds = time.monotonic() - started
    _refuse_if_any_failed(name, failure, world)
    return Decoded(part.pairs, part.loss_sum, part.num_target_tokens, seconds)


class _OtherRankFailedError(Exception):
    """Ends this rank's part; the other rank says why."""


class _OthersWaitError(RankError):
    """Met where the others cannot be told."""


class _Part:
    """What a rank does of an evaluation, and its results so far."""

    def __init__(
        self,
        name: str,
        batches: Sequence[Batch],
        read: ReadBatch,
        decoder: BatchDecoder,
        with_loss: bool,
        world: World,
    ) -> None:
        self.pairs: list[tuple[Example, Hypothesis]] = []
        self.loss_sum = 0.0
        self.num_target_tokens = 0
        self._name = name
        self._batches = batches
        self._read = read
        self._decoder = decoder
        self._with_loss = with_loss
        self._world = world

    def decode(self) -> Exception | None:
        """Decode until no batch is left; what went wrong on this rank, if anything did."""
        try:
            if self._decoder.in_lockstep:
                self._decode_in_lockstep()
            else:
                self._decode_what_is_handed_out()
        except _OtherRankFailedError:
            return None
        except _OthersWaitError:
            raise
        except Exception as error:
            return error
        return None

    def _decode_what_is_handed_out(self) -> None:
        """Whoever is free takes the next batch."""
        task_queue = TaskQueue(len(self._batches), self._world)
        try:
            for number in task_queue:
                examples = self._read(self._batches[number])
                self._add(examples, self._decoder.decode(examples, with_loss=self._with_loss))
        except Exception:
            task_queue.stop()
            raise

    def _decode_in_lockstep(self) -> None:
        """A batch for each rank, then the next ones; where none is left, a rank goes along with silence."""
        for first in range(0, len(self._batches), self._world.size):
            examples, most_windows = self._read_together(self._batches[first : first + self._world.size])
            asked = examples or [self._decoder.silence]
            try:
                decoded = self._decoder.decode(asked, with_loss=self._with_loss, most_windows=most_windows)
            except Exception as error:
                _log_unless_plain(error, self._world)
                raise _OthersWaitError(
                    f"The evaluation of `{self._name}` ended on rank {self._world.rank}: {_reason(error)}"
                ) from error
            if examples:
                self._add(examples, decoded)

    def _read_together(self, batches: Sequence[Batch]) -> tuple[list[Example], int]:
        """This rank's examples of a round, which may be none, and the windows of the rank that has most of them."""
        examples: list[Example] = []
        failure = None
        try:
            if self._world.rank < len(batches):
                examples = self._read(batches[self._world.rank])
        except Exception as error:
            failure = error
        num_windows = sum(example.num_windows for example in examples)
        most_windows, any_failed = max_over_ranks([num_windows, int(failure is not None)], self._world)
        if failure is not None:
            raise failure
        if any_failed:
            raise _OtherRankFailedError
        return examples, most_windows

    def _add(self, examples: Sequence[Example], decoded: DecodedBatch) -> None:
        self.pairs += zip(examples, decoded.hypotheses, strict=True)
        self.loss_sum += decoded.loss_sum
        self.num_target_tokens += decoded.num_target_tokens


def _refuse_if_any_failed(name: str, failure: Exception | None, world: World) -> None:
    """Raise on all ranks what one of them met."""
    if failure is not None:
        _log_unless_plain(failure, world)
    reasons = gather_on_first(None if failure is None else _reason(failure), world)
    failures = [(rank, reason) for rank, reason in enumerate(reasons) if reason is not None]
    first = from_first_rank(failures[:1], world)
    for rank, reason in first:
        raise SharedError(f"The evaluation of `{name}` ended on rank {rank}: {reason}") from failure


def _log_unless_plain(error: Exception, world: World) -> None:
    """With its traceback, if it is nothing that a user could mend by the sentence alone."""
    if not isinstance(error, UserError | torch.OutOfMemoryError):
        log.error("rank %d could not decode a batch", world.rank, exc_info=error)


def _reason(error: Exception) -> str:
    match error:
        case UserError():
            return str(error)
        case torch.OutOfMemoryError():
            return (
                f"the memory of its GPU does not suffice for a batch ({out_of_memory_reason(error)}): lower "
                "`batch_size` or `max_windows` of the evaluation."
            )
        case _:
            return f"{type(error).__name__}: {error}"
