"""Decoding of a test set's batches over ranks: from a shared queue, or in lockstep where weights are sharded.

An error on one rank ends the evaluation on all ranks with its reason: the others stop before their next batch, and none
waits for results that will not come. An error inside a batch in lockstep cannot be shared so, because the other ranks
wait for weights: that rank raises it, and the watch of failures ends the others.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate

import torch

from voxtral_dist.data.examples.example import Example
from voxtral_dist.distributed.collectives import (
    PatientSum,
    from_first_rank,
    gather_on_first,
    max_over_ranks,
    wait_for_all,
)
from voxtral_dist.distributed.standing import advance
from voxtral_dist.distributed.task_queue import TaskQueue
from voxtral_dist.distributed.world import World, out_of_memory_reason
from voxtral_dist.errors import RankError, ReadError, SharedError, UserError
from voxtral_dist.evaluation.batch_decoder import BatchDecoder, DecodedExamples, Hypothesis, groups_of
from voxtral_dist.evaluation.test_set import Batch

log = logging.getLogger(__name__)

ReadBatch = Callable[[Batch], list[Example]]
OnProgress = Callable[[int], None]


@dataclass(frozen=True)
class Decoded:
    """What one rank decoded: examples with their hypotheses, the summed loss of each batch, and the wall time."""

    pairs: list[tuple[Example, Hypothesis]]
    losses: list[float]
    num_target_tokens: int
    seconds: float


class EvaluationStoppedError(Exception):
    """Ends an evaluation on all ranks alike between two batches, because one of them was asked to stop."""


def _never() -> bool:
    return False


def _unseen(num_utterances: int) -> None:
    """Do nothing: nobody looks at the progress."""


def decode_batches(
    name: str,
    batches: Sequence[Batch],
    read: ReadBatch,
    decoder: BatchDecoder,
    with_loss: bool,
    world: World,
    must_stop: Callable[[], bool] = _never,
    on_progress: OnProgress = _unseen,
) -> Decoded:
    """Decode this rank's part of all batches; each batch is decoded by one rank. All ranks call it together.

    Args:
        name: of the test set, for error messages.
        batches: the same on all ranks, expensive ones first.
        read: reads the examples of a batch.
        decoder: decodes them.
        with_loss: whether to measure the loss of targets.
        world: all ranks.
        must_stop: whether this rank is asked to stop; it is asked before each batch.
        on_progress: called with the number of utterances that all ranks have taken, whenever this rank takes some.

    Raises:
        EvaluationStoppedError: on all ranks, if one of them was asked to stop.
        SharedError: on all ranks, if a rank could not read a batch, or could not decode one outside of lockstep.
        ReadError: on all ranks, if a rank could not read a batch because the storage of its shards fails.
        RankError: on a rank that could not decode a batch in lockstep.
    """
    part = _RankDecoder(name, batches, read, decoder, with_loss, world, must_stop, on_progress)
    # The time of decoding excludes waiting for ranks that still load.
    wait_for_all(world)
    arrive = PatientSum(world)
    started = time.monotonic()
    failure = part.decode()
    seconds = time.monotonic() - started
    # The last batch of another rank may take longer than a collective may.
    num_stopped = arrive(int(part.is_stopped))
    _refuse_if_any_failed(name, failure, world)
    if num_stopped:
        raise EvaluationStoppedError
    return Decoded(part.pairs, part.losses, part.num_target_tokens, seconds)


class _OthersWaitError(RankError):
    """An error in lockstep, where the other ranks wait and cannot learn of it."""


@dataclass(frozen=True)
class _Round:
    """What one rank decodes in a round of lockstep.

    examples: none if no batch is left for it. most_windows: of a batch, maximum over ranks. is_over: whether all ranks
    have agreed to end. failure: why, if this rank is the cause.
    """

    examples: list[Example]
    most_windows: int
    is_over: bool
    failure: Exception | None


class _RankDecoder:
    """One rank's part of an evaluation, and its results so far."""

    def __init__(
        self,
        name: str,
        batches: Sequence[Batch],
        read: ReadBatch,
        decoder: BatchDecoder,
        with_loss: bool,
        world: World,
        must_stop: Callable[[], bool],
        on_progress: OnProgress,
    ) -> None:
        # Whether this rank was asked to stop before all batches were taken.
        self.is_stopped = False
        self._must_stop = must_stop
        self._on_progress = on_progress
        self.pairs: list[tuple[Example, Hypothesis]] = []
        self.losses: list[float] = []
        self.num_target_tokens = 0
        self._name = name
        self._batches = batches
        self._read = read
        self._decoder = decoder
        self._with_loss = with_loss
        self._world = world

    def decode(self) -> Exception | None:
        """Decode until no batch is left. Returns an error of this rank that does not keep the others from ending."""
        if self._decoder.in_lockstep:
            return self._decode_in_lockstep()
        tasks = self._tasks()
        # All ranks make it together: where one of them kept an error before that to itself, the others would wait.
        queue = TaskQueue(len(tasks), self._world)
        try:
            self._decode_from_queue(tasks, queue)
        except Exception as error:
            return error
        return None

    def _tasks(self) -> Sequence[Batch]:
        """What the shared queue distributes: batches, or groups of utterances."""
        if not self._decoder.is_continuous:
            return self._batches
        return [group for batch in self._batches for group in groups_of(batch)]

    def _decode_from_queue(self, tasks: Sequence[Batch], queue: TaskQueue) -> None:
        """Take the next task of the shared queue until it is empty."""
        taken = self._taken(tasks, queue)
        try:
            if self._decoder.is_continuous:
                for decoded in self._decoder.stream(self._read_ahead(taken), with_loss=self._with_loss):
                    self._add(decoded)
            else:
                for batch in taken:
                    examples = self._read(batch)
                    advance([example.key for example in examples])
                    self._add(self._decoder.decode(examples, with_loss=self._with_loss))
        except Exception:
            queue.stop()
            raise

    def _taken(self, tasks: Sequence[Batch], queue: TaskQueue) -> Iterator[Batch]:
        """This rank's tasks of the queue; once this rank is asked to stop, no rank gets another one."""
        num_before = _numbers_before(tasks)
        for number in queue:
            if self._must_stop():
                self.is_stopped = True
                queue.stop()
                return
            self._on_progress(num_before[number])
            yield tasks[number]

    def _read_ahead(self, batches: Iterator[Batch]) -> Iterator[list[Example]]:
        """Read each batch while the one before it is decoded."""
        with ThreadPoolExecutor(1) as reader:
            coming = None
            for batch in batches:
                ready, coming = coming, reader.submit(self._read, batch)
                if ready is not None:
                    yield ready.result()
            if coming is not None:
                yield coming.result()

    def _decode_in_lockstep(self) -> Exception | None:
        """Decode in rounds of one batch per rank; a rank without a batch decodes silence.

        Returns an error of this rank if all others know that there is one, and raises any other.
        """
        num_before = _numbers_before(self._batches)
        for first in range(0, len(self._batches), self._world.size):
            self._on_progress(num_before[first])
            now = self._read_together(self._batches[first : first + self._world.size])
            if now.is_over:
                return now.failure
            batch = now.examples or [self._decoder.silence]
            advance([example.key for example in now.examples])
            try:
                decoded = self._decoder.decode(batch, with_loss=self._with_loss, most_windows=now.most_windows)
            except Exception as error:
                _log_unless_plain(error, self._world)
                raise _OthersWaitError(
                    f"The evaluation of `{self._name}` ended on rank {self._world.rank}: {_reason(error)}"
                ) from error
            if now.examples:
                self._add(decoded)
        return None

    def _read_together(self, batches: Sequence[Batch]) -> _Round:
        """Read this rank's batch of a round, which may be empty, and tell the others how that went."""
        examples: list[Example] = []
        failure = None
        try:
            if self._world.rank < len(batches):
                examples = self._read(batches[self._world.rank])
        except Exception as error:
            failure = error
        num_windows = sum(example.num_windows for example in examples)
        most_windows, any_failed, any_asks = max_over_ranks(
            [num_windows, int(failure is not None), int(self._must_stop())], self._world
        )
        self.is_stopped = bool(any_asks and not any_failed)
        return _Round(examples, most_windows, bool(any_failed or any_asks), failure)

    def _add(self, decoded: DecodedExamples) -> None:
        advance()
        self.pairs += decoded.pairs
        if decoded.num_target_tokens:
            self.losses.append(decoded.loss_sum)
        self.num_target_tokens += decoded.num_target_tokens


def _numbers_before(batches: Sequence[Batch]) -> list[int]:
    """Number of utterances before each batch, and of all."""
    return [0, *accumulate(map(len, batches))]


def _refuse_if_any_failed(name: str, failure: Exception | None, world: World) -> None:
    """Raise on all ranks the first error of any rank."""
    if failure is not None:
        _log_unless_plain(failure, world)
    told = gather_on_first(None if failure is None else (_reason(failure), isinstance(failure, ReadError)), world)
    failures = [(rank, *theirs) for rank, theirs in enumerate(told) if theirs is not None]
    for rank, reason, is_of_storage in from_first_rank(failures[:1], world):
        error_type = ReadError if is_of_storage else SharedError
        raise error_type(f"The evaluation of `{name}` ended on rank {rank}: {reason}") from failure


def _log_unless_plain(error: Exception, world: World) -> None:
    """Log an error with its traceback, unless its message is enough to fix it."""
    if not isinstance(error, UserError | torch.OutOfMemoryError):
        log.error("rank %d could not decode a batch", world.rank, exc_info=error)


def _reason(error: Exception) -> str:
    match error:
        case UserError():
            return str(error)
        case torch.OutOfMemoryError():
            return (
                f"out of GPU memory in a batch ({out_of_memory_reason(error)}): lower `evaluation.batch_size` or "
                "`evaluation.max_windows`."
            )
        case _:
            return f"{type(error).__name__}: {error}".rstrip(": ")
