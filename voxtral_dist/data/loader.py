"""The micro-batches of one rank, step by step, from any step on.

The plan is asked in the rank's own process, and workers get lists of samples to read: they hold no state, so any number
of them gives the same stream, and the place to resume from is the number of the step. With each list a worker is told
its next one, so that reading it goes on while it decodes the first.
"""

from __future__ import annotations

import hashlib
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, islice

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from voxtral_dist.config import SpecAugmentConfig, TrainDataConfig
from voxtral_dist.data.examples.context import training_words
from voxtral_dist.data.examples.feature_masks import check_spec_augment, draw_feature_masks
from voxtral_dist.data.examples.micro_batch import MicroBatch, collate, weightless_micro_batch
from voxtral_dist.data.examples.prompting import Prompting
from voxtral_dist.data.examples.reader import BadUtterance, Clip, Example, UtteranceError, UtteranceReader
from voxtral_dist.data.plan.cutting import Budget
from voxtral_dist.data.plan.filters import ExampleSizes
from voxtral_dist.data.plan.sorting import SlotExamples
from voxtral_dist.data.plan.streams import Streams, build_streams
from voxtral_dist.data.plan.train_plan import PLAN_VERSION, PlanShape, TrainPlan, rank_slots, refuse_idle_ranks
from voxtral_dist.data.stored.checks import MAX_CHARS_PER_SECOND
from voxtral_dist.data.stored.index import ShardIndex, ShardSet, read_sets, refuse_unusable
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.text.word_list import WordList

_NOTHING = SlotExamples((), (), ())


@dataclass(frozen=True)
class StepBatches:
    """What one rank runs in one step: as many micro-batches as every other rank.

    waiting_seconds: from asking for them until they were there.
    """

    step: int
    micro_batches: list[MicroBatch]
    waiting_seconds: float = 0.0


@dataclass(frozen=True)
class TrainingSet:
    """An index, what of it is drawn, and in which order: the same on every rank.

    most_windows: that a micro-batch can have. words: of contexts.
    """

    index: ShardIndex
    streams: Streams
    plan: TrainPlan
    fingerprint: str
    most_windows: int
    words: WordList | None = None

    def lines(self) -> Iterator[str]:
        """What a user should know before the run: what is left out, the mixture, and how full micro-batches are."""
        if self.streams.skipped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.streams.skipped.items())
            yield f"left out {sum(self.streams.skipped.values())} of {len(self.index)} utterances: {reasons}"
        if len(self.streams.streams) > 1:
            drawn_seconds = sum(stream.drawn_seconds for stream in self.streams.streams)
            for stream in self.streams.streams:
                yield (
                    f"{stream.name}: {stream.num_utterances} utterances, each drawn "
                    f"{stream.num_draws / stream.num_utterances:.2f} times a pass: "
                    f"{100 * stream.drawn_seconds / drawn_seconds:.1f} % of the audio"
                )
        figures = self.plan.figures
        yield (
            f"an epoch has {self.plan.steps_per_epoch} steps; a micro-batch has about {figures.num_examples:.1f} "
            f"examples of {figures.num_utterances:.1f} utterances; audio fills "
            f"{100 * figures.window_fill:.0f} % of windows, tokens {100 * figures.token_fill:.0f} % of the positions"
        )


class TrainLoader:
    """The stream of one rank."""

    def __init__(
        self, training_set: TrainingSet, dataset: _SlotDataset, num_workers: int, num_steps: int, rank: int, size: int
    ) -> None:
        self.training_set = training_set
        self._dataset = dataset
        self._num_workers = num_workers
        self._num_steps = num_steps
        self._rank = rank
        self._world_size = size

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


def training_reader(
    config: TrainDataConfig, index: ShardIndex, prompts: VoxtralPrompts, storage: Storage, words: WordList | None
) -> UtteranceReader:
    """What makes examples of the samples of a training set; `words` are those of contexts.

    Raises:
        UserError: an augmentation cannot be built.
    """
    augmentation = None
    if config.augmentation:
        from voxtral_dist.data.examples.augmentation import Augmentation

        augmentation = Augmentation(config.augmentation, prompts.sampling_rate)
    most_text = config.max_chars_per_second or MAX_CHARS_PER_SECOND
    prompting = Prompting.of_training(config, prompts, words)
    return UtteranceReader(index, prompts, config.max_target_tokens, storage, augmentation, most_text, prompting)


def build_training_set(
    config: TrainDataConfig, prompts: VoxtralPrompts, seed: int, storage: Storage | None = None
) -> TrainingSet:
    """The samples and their order, the same on every rank.

    Raises:
        UserError: shards are missing, or no sample passes the filters.
    """
    used = storage or Storage()
    sets = {name: read_sets(patterns, used) for name, patterns in config.named_sets.items()}
    for name, parts in sets.items():
        refuse_unusable(name, parts)
    index = ShardIndex(list(chain.from_iterable(sets.values())))
    counts = [sum(shard.num_utterances for part in parts for shard in part.shards) for parts in sets.values()]
    sizes = ExampleSizes.of(prompts, config.context.max_tokens if config.context else 0)
    streams = build_streams(config, index, dict(zip(sets, accumulate(counts), strict=True)), sizes)
    shape = PlanShape(
        slots_per_step=config.slots_per_step,
        budget=Budget(config.max_examples, config.max_windows, config.max_tokens),
        megabatch_steps=config.megabatch_steps,
        shuffle_block_size=config.shuffle_block_size,
        max_packed_tokens=_max_packed_tokens(config, sizes) if config.packing else None,
    )
    plan = TrainPlan(index, streams, sizes, shape, (seed,))
    words = training_words(config.context)
    fingerprint = _fingerprint(sets, sizes, plan, words)
    return TrainingSet(index, streams, plan, fingerprint, _most_windows(config, index, sizes), words)


def _most_windows(config: TrainDataConfig, index: ShardIndex, sizes: ExampleSizes) -> int:
    """Windows of a micro-batch of the longest samples that its limits allow, by the durations of the index."""
    longest_seconds = max(part.longest_seconds for part in index.sets)
    if config.max_duration_seconds is not None:
        longest_seconds = min(longest_seconds, config.max_duration_seconds)
    of_an_example = int(sizes.windows(np.array([round(1000 * longest_seconds)]))[0])
    limits = [
        config.max_windows,
        config.max_examples and config.max_examples * of_an_example,
        config.max_tokens and config.max_tokens // sizes.audio_tokens_per_window,
    ]
    # A clip that is larger than these limits is left out.
    return min(limit for limit in limits if limit is not None)


def _max_packed_tokens(config: TrainDataConfig, sizes: ExampleSizes) -> int:
    """Text tokens of a packed example: as many as a target may have, and as a micro-batch of this example alone."""
    if config.max_tokens is None:
        return config.max_target_tokens
    return min(config.max_target_tokens, config.max_tokens - sizes.audio_tokens_per_window - sizes.num_prompt_tokens)


def _fingerprint(
    sets: Mapping[str, Sequence[ShardSet]], sizes: ExampleSizes, plan: TrainPlan, words: WordList | None
) -> str:
    """The same for the same samples in the same sets and order, and the same words, whatever their place."""
    known = [(name, [part.fingerprint for part in parts]) for name, parts in sets.items()]
    listed = "" if words is None else words.fingerprint
    return hashlib.sha256(repr((PLAN_VERSION, plan.steps_per_epoch, sizes, known, listed)).encode()).hexdigest()[:16]


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
        drawn = zip(samples.utterance_ids, samples.passes, strict=True)
        for size in samples.example_sizes:
            members = list(islice(drawn, size))
            clips = list(self._clips(members, bad))
            while clips:
                try:
                    yield self._masked(self._reader.join(clips, (self._seed, members[0][1])), members[0][1])
                    break
                except UtteranceError as error:
                    bad.append(self._dropped(clips, error.bad))

    def _dropped(self, clips: list[Clip], bad: BadUtterance) -> BadUtterance:
        """Take out the last of some clips that make no example."""
        dropped = clips.pop()
        if not clips:
            return bad
        # Where the tokens of a packed text are more than the index says, its last utterances do not fit.
        shard = self._reader.shard_name(dropped.utterance_id)
        return BadUtterance(
            shard, dropped.key, f"does not fit into the example that it is packed into, which {bad.reason}"
        )

    def _clips(self, members: Sequence[tuple[int, int]], bad: list[BadUtterance]) -> Iterator[Clip]:
        for utterance_id, epoch_index in members:
            try:
                yield self._reader.clip(utterance_id, (self._seed, epoch_index), is_packed=len(members) > 1)
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
