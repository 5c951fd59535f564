"""The micro-batches of one rank, step by step, starting at any step.

The rank's own process evaluates the plan and sends its workers lists of utterances to load. Workers hold no state, so
their number does not change the result, and resuming takes only the number of the step. With each list a worker also
gets its next one, whose bytes it reads ahead while it decodes the first.
"""

from __future__ import annotations

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Self

from torch.utils.data import DataLoader, Dataset, Sampler

from voxtral_dist.config import SpecAugmentConfig, TrainDataConfig
from voxtral_dist.data.examples.bad_utterance import BadUtterance, UtteranceError
from voxtral_dist.data.examples.example import Example, LoadedUtterance
from voxtral_dist.data.examples.feature_masks import check_spec_augment, draw_feature_masks
from voxtral_dist.data.examples.micro_batch import MicroBatch, collate, weightless_micro_batch
from voxtral_dist.data.examples.reader import UtteranceReader
from voxtral_dist.data.plan.slot_examples import SlotExamples
from voxtral_dist.data.plan.train_plan import rank_slots, refuse_idle_ranks
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.data.training_set import TrainingSet, build_training_set, training_reader
from voxtral_dist.errors import ReadError
from voxtral_dist.model.prompts import VoxtralPrompts

_NOTHING = SlotExamples((), (), ())


@dataclass(frozen=True)
class StepBatches:
    """The micro-batches of one rank in one step, equally many on every rank.

    step: number of the step.
    micro_batches: one for each slot of the rank.
    waiting_seconds: time that the rank waited for its data workers.
    upcoming: the micro-batches of the next step, about which ranks tell each other during this one; None at the end of
        the run.
    """

    step: int
    micro_batches: list[MicroBatch]
    waiting_seconds: float = 0.0
    upcoming: StepBatches | None = None

    @property
    def read_error(self) -> str | None:
        """Why they could not be read, where the storage of the shards fails; None if they were."""
        return next((batch.read_error for batch in self.micro_batches if batch.read_error is not None), None)


class StepIterator(Iterator[StepBatches]):
    """The micro-batches of one rank, step by step; a context that ends its data workers.

    The workers start, and begin to read, when it is made. It takes a step from them when the one before it is asked
    for. Where the storage of the shards fails, `upcoming` says so, and the step itself raises `ReadError`.
    """

    def __init__(self, batches: Iterator[MicroBatch], steps: range, num_micro_batches: Callable[[int], int]) -> None:
        self._batches = batches
        self._steps: Iterator[int] = iter(steps)
        self._num_micro_batches = num_micro_batches
        self._upcoming: StepBatches | None = None

    def __next__(self) -> StepBatches:
        asked = time.monotonic()
        current = self._upcoming or self._take()
        if current is None:
            raise StopIteration
        if current.read_error is not None:
            raise ReadError(current.read_error)
        self._upcoming = self._take()
        return replace(current, waiting_seconds=time.monotonic() - asked, upcoming=self._upcoming)

    def _take(self) -> StepBatches | None:
        step = next(self._steps, None)
        if step is None:
            return None
        count, batches = self._num_micro_batches(step), []
        for batch in islice(self._batches, count):
            batches.append(batch)
            if batch.read_error is not None:
                # The others would fail too, each after all attempts.
                batches += [batch] * (count - len(batches))
                break
        return StepBatches(step, batches)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the data workers; no further step follows."""
        self._steps, self._upcoming = iter(()), None
        # torch ends them with the last reference to its iterator, which an error's traceback may hold for long.
        shut_down = getattr(self._batches, "_shutdown_workers", None)
        self._batches = iter(())
        if shut_down is not None:
            shut_down()


class TrainLoader:
    """The micro-batches of one rank over a whole run of `num_steps`; `build_train_loader` makes it."""

    def __init__(
        self,
        training_set: TrainingSet,
        dataset: _SlotDataset,
        num_workers: int,
        num_steps: int,
        rank: int,
        world_size: int,
        pin_memory: bool,
    ) -> None:
        self.training_set = training_set
        self._dataset = dataset
        self._num_workers = num_workers
        self.num_steps = num_steps
        self._rank = rank
        self._world_size = world_size
        self._pin_memory = pin_memory

    def starting_at(self, first_step: int) -> StepIterator:
        """Start the data workers, and iterate over the steps from `first_step` to the end of the run."""
        steps = range(first_step, self.num_steps)
        return StepIterator(self._batches(steps) if len(steps) else iter(()), steps, self._num_micro_batches)

    def _batches(self, steps: range) -> Iterator[MicroBatch]:
        per_step = self._num_micro_batches(steps.start)
        stream = DataLoader(
            self._dataset,
            sampler=_Requests(self._slots_of_step, steps, max(1, self._num_workers)),
            batch_size=None,
            num_workers=self._num_workers,
            worker_init_fn=_ignore_stop_signals,
            # All workers together are two steps ahead, and each has a finished micro-batch while it makes another.
            prefetch_factor=max(2, -(-2 * per_step // self._num_workers)) if self._num_workers else None,
            # Forked workers share the index and the tokenizer with the rank.
            multiprocessing_context="fork" if self._num_workers else None,
            pin_memory=self._pin_memory,
        )
        return iter(stream)

    def _num_micro_batches(self, step: int) -> int:
        return -(-self.training_set.plan.num_slots(step) // self._world_size)

    def _slots_of_step(self, step: int) -> list[SlotExamples]:
        plan = self.training_set.plan
        mine = [plan.slot(step, slot) for slot in rank_slots(plan.num_slots(step), self._rank, self._world_size)]
        # A rank with one slot fewer than others runs a micro-batch without targets instead.
        return mine + [_NOTHING] * (self._num_micro_batches(step) - len(mine))


def build_train_loader(
    config: TrainDataConfig,
    prompts: VoxtralPrompts,
    seed: int,
    num_steps: int | Callable[[int], int],
    rank: int,
    world_size: int,
    storage: Storage | None = None,
    pin_memory: bool = False,
) -> TrainLoader:
    """Build the loader of one rank.

    Args:
        config: the training data.
        prompts: makes token ids.
        seed: seeds the order and all draws.
        num_steps: number of steps of the run, or a function that returns it for the steps of an epoch.
        rank: number of the rank, from 0.
        world_size: number of ranks.
        storage: reads shards; None reads local files and URLs with the default settings.
        pin_memory: put micro-batches into page-locked memory, from which copies to a GPU do not block; needs a GPU.

    Raises:
        UserError: shards are missing, no utterance passes the filters, or there are more ranks than slots.
    """
    refuse_idle_ranks(config.slots_per_step, world_size)
    storage = storage or Storage()
    training_set = build_training_set(config, prompts, seed, storage)
    reader = training_reader(config, training_set.index, prompts, storage, training_set.word_list)
    if config.spec_augment is not None:
        check_spec_augment(config.spec_augment, prompts.num_mel_bins)
    dataset = _SlotDataset(reader, prompts, config.spec_augment, seed)
    if callable(num_steps):
        num_steps = num_steps(training_set.plan.steps_per_epoch)
    return TrainLoader(training_set, dataset, config.num_workers, num_steps, rank, world_size, pin_memory)


def _ignore_stop_signals(_worker: int) -> None:
    """Ignore signals that launchers and terminals send to whole process trees: the rank decides when to stop."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True)
class _Request:
    """A micro-batch for a worker to make, and the one that the same worker makes next."""

    current: SlotExamples
    upcoming: SlotExamples


class _Requests(Sampler[_Request]):
    """The micro-batches of a rank in order; a DataLoader assigns them to its workers round-robin."""

    def __init__(self, slots_of_step: Callable[[int], list[SlotExamples]], steps: range, num_workers: int) -> None:
        self._slots_of_step = slots_of_step
        self._steps = steps
        self._num_workers = num_workers

    def __iter__(self) -> Iterator[_Request]:
        waiting: deque[SlotExamples] = deque()
        for examples in chain.from_iterable(map(self._slots_of_step, self._steps)):
            waiting.append(examples)
            if len(waiting) > self._num_workers:
                yield _Request(waiting.popleft(), examples)
        for examples in waiting:
            yield _Request(examples, _NOTHING)


class _SlotDataset(Dataset[MicroBatch]):
    """Makes the micro-batch of a request in a data worker."""

    def __init__(
        self, reader: UtteranceReader, prompts: VoxtralPrompts, spec_augment: SpecAugmentConfig | None, seed: int
    ) -> None:
        self._reader = reader
        self._prompts = prompts
        self._spec_augment = spec_augment
        self._seed = seed

    def __getitem__(self, request: _Request) -> MicroBatch:
        bad: list[BadUtterance] = []
        try:
            examples = list(self._examples(request, bad))
        except ReadError as error:
            # A value, because torch raises errors of workers with their traceback in the message.
            return replace(weightless_micro_batch(self._prompts), read_error=str(error))
        if not examples:
            return weightless_micro_batch(self._prompts, bad)
        return collate(examples, self._prompts, bad)

    def _examples(self, request: _Request, bad: list[BadUtterance]) -> Iterator[Example]:
        """The usable examples of a request; unusable utterances are appended to `bad`."""
        current = request.current
        self._reader.prefetch(current.utterance_ids + request.upcoming.utterance_ids)
        draws = zip(current.utterance_ids, current.epochs, strict=True)
        for size in current.example_sizes:
            packed = list(islice(draws, size))
            epoch_index = packed[0][1]
            utterances = list(self._load(packed, bad))
            while utterances:
                try:
                    yield self._masked(self._reader.join(utterances, (self._seed, epoch_index)), epoch_index)
                    break
                except UtteranceError as error:
                    bad.append(self._drop_last(utterances, error.bad))

    def _drop_last(self, utterances: list[LoadedUtterance], bad: BadUtterance) -> BadUtterance:
        """Remove the last of some utterances that cannot be joined, and say why."""
        dropped = utterances.pop()
        if not utterances:
            return bad
        # A packed text can have more tokens than its parts have in the index: then its last utterances do not fit.
        shard = self._reader.shard_name(dropped.utterance_id)
        return BadUtterance(
            shard, dropped.key, f"does not fit into the example that it is packed into, which {bad.reason}"
        )

    def _load(self, packed: Sequence[tuple[int, int]], bad: list[BadUtterance]) -> Iterator[LoadedUtterance]:
        for utterance_id, epoch_index in packed:
            try:
                yield self._reader.load(utterance_id, (self._seed, epoch_index), is_packed=len(packed) > 1)
            except UtteranceError as error:
                # Dropped, never replaced: the plan of all other slots does not change.
                bad.append(error.bad)

    def _masked(self, example: Example, epoch_index: int) -> Example:
        if self._spec_augment is None:
            return example
        prompts = self._prompts
        masks = draw_feature_masks(
            self._spec_augment,
            (self._seed, epoch_index, example.utterance_id),
            math.ceil(round(example.duration_seconds * prompts.sampling_rate) / prompts.hop_samples),
            prompts.window_samples // prompts.hop_samples,
            prompts.num_mel_bins,
            frames_per_second=prompts.sampling_rate / prompts.hop_samples,
        )
        return replace(example, feature_masks=masks)
