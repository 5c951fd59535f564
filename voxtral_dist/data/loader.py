"""The micro-batches of one rank, step by step, from any step on.

The plan is asked in the rank's own process, and workers get lists of samples to read: they hold no state, so any number
of them gives the same stream, and the place to resume from is the number of the step. With each list a worker is told
its next one, so that reading it goes on while it decodes the first.
"""

from __future__ import annotations

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice

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
from voxtral_dist.model.prompts import VoxtralPrompts

_NOTHING = SlotExamples((), (), ())


@dataclass(frozen=True)
class StepBatches:
    """What one rank runs in one step: as many micro-batches as every other rank.

    waiting_seconds: from asking for them until they were there.
    """

    step: int
    micro_batches: list[MicroBatch]
    waiting_seconds: float = 0.0


class TrainLoader:
    """The stream of one rank."""

    def __init__(
        self,
        training_set: TrainingSet,
        dataset: _SlotDataset,
        num_workers: int,
        num_steps: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.training_set = training_set
        self._dataset = dataset
        self._num_workers = num_workers
        self._num_steps = num_steps
        self._rank = rank
        self._world_size = world_size

    def starting_at(self, first_step: int) -> Iterator[StepBatches]:
        """The steps from `first_step` to the end of the run."""
        steps = range(first_step, self._num_steps)
        per_step = self._num_micro_batches(first_step) if len(steps) else 1
        stream = DataLoader(
            self._dataset,
            sampler=_Requests(self._slots_of_step, steps, max(1, self._num_workers)),
            batch_size=None,
            num_workers=self._num_workers,
            worker_init_fn=_ignore_stop_signals,
            # Two steps ahead over all workers, and one micro-batch for each worker while it makes the next.
            prefetch_factor=max(2, -(-2 * per_step // self._num_workers)) if self._num_workers else None,
            # Forked workers share the index and the tokenizer with the rank.
            multiprocessing_context="fork" if self._num_workers else None,
        )
        batches = iter(stream)
        for step in steps:
            asked = time.monotonic()
            micro_batches = list(islice(batches, self._num_micro_batches(step)))
            yield StepBatches(step, micro_batches, time.monotonic() - asked)

    def _num_micro_batches(self, step: int) -> int:
        return -(-self.training_set.plan.num_slots(step) // self._world_size)

    def _slots_of_step(self, step: int) -> list[SlotExamples]:
        plan = self.training_set.plan
        mine = [plan.slot(step, slot) for slot in rank_slots(plan.num_slots(step), self._rank, self._world_size)]
        # A rank that has a slot less than others runs a micro-batch of weight zero in its place.
        return mine + [_NOTHING] * (self._num_micro_batches(step) - len(mine))


def build_train_loader(
    config: TrainDataConfig,
    prompts: VoxtralPrompts,
    seed: int,
    num_steps: int,
    rank: int,
    world_size: int,
    storage: Storage | None = None,
) -> TrainLoader:
    """The stream of one rank of `world_size`.

    Raises:
        UserError: shards are missing, no sample passes the filters, or there are more ranks than slots.
    """
    refuse_idle_ranks(config.slots_per_step, world_size)
    storage = storage or Storage()
    training_set = build_training_set(config, prompts, seed, storage)
    reader = training_reader(config, training_set.index, prompts, storage, training_set.words)
    if config.spec_augment is not None:
        check_spec_augment(config.spec_augment, prompts.num_mel_bins)
    dataset = _SlotDataset(reader, prompts, config.spec_augment, seed)
    return TrainLoader(training_set, dataset, config.num_workers, num_steps, rank, world_size)


def _ignore_stop_signals(_worker: int) -> None:
    """Launchers signal whole process trees: the rank decides when to stop, and its workers end with it."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True)
class _Request:
    """The samples of a micro-batch, and those that the same worker is going to be asked for next."""

    samples: SlotExamples
    upcoming: SlotExamples


class _Requests(Sampler[_Request]):
    """The micro-batches of a rank in order; a DataLoader deals them to its workers in turn."""

    def __init__(self, slots_of_step: Callable[[int], list[SlotExamples]], steps: range, num_workers: int) -> None:
        self._slots_of_step = slots_of_step
        self._steps = steps
        self._num_workers = num_workers

    def __iter__(self) -> Iterator[_Request]:
        waiting: deque[SlotExamples] = deque()
        for samples in chain.from_iterable(map(self._slots_of_step, self._steps)):
            waiting.append(samples)
            if len(waiting) > self._num_workers:
                yield _Request(waiting.popleft(), samples)
        for samples in waiting:
            yield _Request(samples, _NOTHING)


class _SlotDataset(Dataset[MicroBatch]):
    """Micro-batches by the samples that they are made of."""

    def __init__(
        self, reader: UtteranceReader, prompts: VoxtralPrompts, spec_augment: SpecAugmentConfig | None, seed: int
    ) -> None:
        self._reader = reader
        self._prompts = prompts
        self._spec_augment = spec_augment
        self._seed = seed

    def __getitem__(self, request: _Request) -> MicroBatch:
        bad: list[BadUtterance] = []
        examples = list(self._examples(request, bad))
        if not examples:
            return weightless_micro_batch(self._prompts, bad)
        return collate(examples, self._prompts.pad_id, self._prompts.window_samples, bad)

    def _examples(self, request: _Request, bad: list[BadUtterance]) -> Iterator[Example]:
        samples = request.samples
        self._reader.prefetch(samples.utterance_ids + request.upcoming.utterance_ids)
        drawn = zip(samples.utterance_ids, samples.epochs, strict=True)
        for size in samples.example_sizes:
            members = list(islice(drawn, size))
            clips = list(self._clips(members, bad))
            while clips:
                try:
                    yield self._masked(self._reader.join(clips, (self._seed, members[0][1])), members[0][1])
                    break
                except UtteranceError as error:
                    bad.append(self._dropped(clips, error.bad))

    def _dropped(self, clips: list[LoadedUtterance], bad: BadUtterance) -> BadUtterance:
        """Take out the last of some clips that make no example."""
        dropped = clips.pop()
        if not clips:
            return bad
        # Where the tokens of a packed text are more than the index says, its last utterances do not fit.
        shard = self._reader.shard_name(dropped.utterance_id)
        return BadUtterance(
            shard, dropped.key, f"does not fit into the example that it is packed into, which {bad.reason}"
        )

    def _clips(self, members: Sequence[tuple[int, int]], bad: list[BadUtterance]) -> Iterator[LoadedUtterance]:
        for utterance_id, epoch_index in members:
            try:
                yield self._reader.load(utterance_id, (self._seed, epoch_index), is_packed=len(members) > 1)
            except UtteranceError as error:
                # Taken out, never replaced: the plan of all other slots stays as it is.
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
