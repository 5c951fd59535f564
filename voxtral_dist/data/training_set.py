"""The utterances of a training set and their order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np

from voxtral_dist.config import TrainDataConfig
from voxtral_dist.data.examples.prompting import Prompting, training_word_list
from voxtral_dist.data.examples.reader import UtteranceReader
from voxtral_dist.data.plan.cutting import Budget
from voxtral_dist.data.plan.example_sizes import ExampleSizes
from voxtral_dist.data.plan.streams import Streams, build_streams
from voxtral_dist.data.plan.train_plan import PLAN_VERSION, PlanShape, TrainPlan
from voxtral_dist.data.stored.checks import MAX_CHARS_PER_SECOND
from voxtral_dist.data.stored.index import ShardIndex
from voxtral_dist.data.stored.index_files import check_train_shards, read_sets
from voxtral_dist.data.stored.shard_set import ShardSet
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.text.word_list import WordList


@dataclass(frozen=True)
class TrainingSet:
    """An index, what of it is drawn, and in which order: the same on every rank.

    max_windows_per_micro_batch: that a micro-batch can have. words: of contexts.
    """

    index: ShardIndex
    streams: Streams
    plan: TrainPlan
    fingerprint: str
    max_windows_per_micro_batch: int
    words: WordList | None = None

    def lines(self) -> Iterator[str]:
        """What a user should know before the run: what is left out, the mixture, and how full micro-batches are."""
        if self.streams.skipped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.streams.skipped.items())
            yield f"skipped {sum(self.streams.skipped.values())} of {len(self.index)} utterances: {reasons}"
        if len(self.streams.streams) > 1:
            drawn_seconds = sum(stream.drawn_seconds for stream in self.streams.streams)
            for stream in self.streams.streams:
                yield (
                    f"{stream.name}: {stream.num_utterances} utterances, each drawn "
                    f"{stream.num_draws / stream.num_utterances:.2f} times a pass: "
                    f"{100 * stream.drawn_seconds / drawn_seconds:.1f} % of the audio"
                )
        figures = self.plan.statistics
        yield (
            f"an epoch has {self.plan.steps_per_epoch} steps; a micro-batch has about {figures.num_examples:.1f} "
            f"examples of {figures.num_utterances:.1f} utterances; audio fills "
            f"{100 * figures.window_fill:.0f} % of windows, tokens {100 * figures.token_fill:.0f} % of the positions"
        )


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
        check_train_shards(name, parts)
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
    words = training_word_list(config.context)
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
