"""The utterances of a training set, and the order in which they are drawn."""

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
from voxtral_dist.output.counting import counted
from voxtral_dist.text.word_list import WordList


@dataclass(frozen=True)
class TrainingSet:
    """The utterances of a training set and their order, equal on every rank.

    index: all stored utterances.
    streams: those that pass the filters, and how often they are drawn.
    plan: the order.
    fingerprint: hash of utterances, order and word list; a run resumes only with equal fingerprints.
    max_windows_per_micro_batch: upper bound of the encoder windows of a micro-batch.
    word_list: the listed words that contexts draw from; None if no file is configured.
    """

    index: ShardIndex
    streams: Streams
    plan: TrainPlan
    fingerprint: str
    max_windows_per_micro_batch: int
    word_list: WordList | None = None

    def lines(self) -> Iterator[str]:
        """A summary for the start of a run: skipped utterances, the mixture, and the fill of micro-batches."""
        if self.streams.skipped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.streams.skipped.items())
            yield f"skipped {sum(self.streams.skipped.values())} of {counted(len(self.index), 'utterance')}: {reasons}"
        if len(self.streams.streams) > 1:
            drawn_seconds = sum(stream.drawn_seconds for stream in self.streams.streams)
            for stream in self.streams.streams:
                yield (
                    f"{stream.name}: {counted(stream.num_utterances, 'utterance')}, each drawn "
                    f"{stream.num_draws / stream.num_utterances:.2f} times per epoch: "
                    f"{100 * stream.drawn_seconds / drawn_seconds:.1f} % of the audio"
                )
        statistics = self.plan.statistics
        yield (
            f"an epoch has {counted(self.plan.steps_per_epoch, 'step')}; a micro-batch has about "
            f"{statistics.num_examples:.1f} examples of {statistics.num_utterances:.1f} utterances; audio fills "
            f"{100 * statistics.window_fill:.0f} % of windows, tokens {100 * statistics.token_fill:.0f} % of positions"
        )


def training_reader(
    config: TrainDataConfig, index: ShardIndex, prompts: VoxtralPrompts, storage: Storage, word_list: WordList | None
) -> UtteranceReader:
    """The reader of the utterances of a training set, whose contexts draw from `word_list`.

    Raises:
        UserError: the augmentation cannot be built.
    """
    augmentation = None
    if config.augmentation:
        from voxtral_dist.data.examples.augmentation import Augmentation

        augmentation = Augmentation(config.augmentation, prompts.sampling_rate)
    return UtteranceReader(
        index,
        prompts,
        config.max_target_tokens,
        storage=storage,
        augmentation=augmentation,
        max_chars_per_second=config.max_chars_per_second or MAX_CHARS_PER_SECOND,
        prompting=Prompting.of_training(config, prompts, word_list),
    )


def build_training_set(
    config: TrainDataConfig, prompts: VoxtralPrompts, seed: int, storage: Storage | None = None
) -> TrainingSet:
    """Read the indices of a training set and plan its order, equally on every rank.

    Raises:
        UserError: shards are missing, no utterance of a set passes the filters, or the word list cannot be read.
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
    word_list = training_word_list(config.context)
    fingerprint = _fingerprint(sets, sizes, plan, word_list)
    return TrainingSet(index, streams, plan, fingerprint, _max_windows(config, index, sizes), word_list)


def _max_windows(config: TrainDataConfig, index: ShardIndex, sizes: ExampleSizes) -> int:
    """Windows of a micro-batch of the longest utterances that the limits allow, by the durations in the index."""
    longest_seconds = max(part.longest_seconds for part in index.sets)
    if config.max_duration_seconds is not None:
        longest_seconds = min(longest_seconds, config.max_duration_seconds)
    per_example = int(sizes.windows(np.array([round(1000 * longest_seconds)]))[0])
    limits = [
        config.max_windows,
        config.max_examples and config.max_examples * per_example,
        config.max_tokens and config.max_tokens // sizes.audio_tokens_per_window,
    ]
    # The filters skip utterances that are larger than a limit.
    return min(limit for limit in limits if limit is not None)


def _max_packed_tokens(config: TrainDataConfig, sizes: ExampleSizes) -> int:
    """Maximum text tokens of a packed example, which must fit into a target and, alone, into a micro-batch."""
    if config.max_tokens is None:
        return config.max_target_tokens
    return min(config.max_target_tokens, config.max_tokens - sizes.audio_tokens_per_window - sizes.num_prompt_tokens)


def _fingerprint(
    sets: Mapping[str, Sequence[ShardSet]], sizes: ExampleSizes, plan: TrainPlan, word_list: WordList | None
) -> str:
    """A hash of the utterances of each set, their order and the word list, but not of where these are stored."""
    known = [(name, [part.fingerprint for part in parts]) for name, parts in sets.items()]
    listed = "" if word_list is None else word_list.fingerprint
    return hashlib.sha256(repr((PLAN_VERSION, plan.steps_per_epoch, sizes, known, listed)).encode()).hexdigest()[:16]
