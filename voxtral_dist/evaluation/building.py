"""Test sets as configured: their utterances are checked against the model's limits and cut into batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from voxtral_dist.config import MIN_NEW_TOKENS, EvaluationConfig, TestSetConfig, TextStep
from voxtral_dist.data.examples.prompting import Prompting, TestContexts
from voxtral_dist.data.examples.reader import UtteranceReader
from voxtral_dist.data.plan.cutting import Budget, cut_micro_batches
from voxtral_dist.data.plan.example_sizes import ExampleSizes, text_tokens
from voxtral_dist.data.stored.index import ShardIndex, read_index
from voxtral_dist.data.stored.shard_set import Ids, Records
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.distributed.collectives import ranks_unlike_first
from voxtral_dist.distributed.world import World
from voxtral_dist.errors import UserError
from voxtral_dist.evaluation.decoding_memory import DecodingShape
from voxtral_dist.evaluation.test_set import Batch, TestSet
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.output.counting import counted
from voxtral_dist.scoring.grouping import Grouping
from voxtral_dist.text.word_list import WordList


def build_test_sets(
    config: EvaluationConfig,
    prompts: VoxtralPrompts,
    target_text: Sequence[TextStep],
    storage: Storage | None = None,
) -> list[TestSet]:
    """Build all configured test sets.

    A set with lists of words comes once without a list, under its own name, and once for each size of the lists.

    Args:
        config: names the test sets.
        prompts: of the model.
        target_text: steps applied to the targets of the loss, as in training; references stay as they are.
        storage: where shards are read from.

    Raises:
        UserError: a test set cannot be used, or two have the same name.
    """
    built = [
        sized
        for name, test_set in config.test_sets.items()
        for sized in build_test_set(name, test_set, config, prompts, target_text, storage or Storage())
    ]
    names = Counter(test_set.name for test_set in built)
    twice = next((name for name, count in names.items() if count > 1), None)
    if twice is not None:
        raise UserError(
            f"`evaluation.test_sets`: `{twice}` is the name of a set, and of another set with lists of words: rename "
            "the set."
        )
    return built


def build_test_set(
    name: str,
    config: TestSetConfig,
    settings: EvaluationConfig,
    prompts: VoxtralPrompts,
    target_text: Sequence[TextStep],
    storage: Storage,
) -> list[TestSet]:
    """Build one test set, and one more for each size of its lists of words.

    Raises:
        UserError: its shards are missing or empty, an utterance is too long for the model, or its words cannot be read.
    """
    grouping = Grouping.of(settings)
    index = read_index([config.shards], storage)
    if config.max_utterances is not None:
        index = index.first(config.max_utterances)
    has_answers = _has_answers(name, index, config)
    sizes = ExampleSizes.of(prompts)
    positions = sizes.positions_of(index.records)
    _refuse_too_long(name, index, positions, prompts)
    lists = _Lists.read(name, config, prompts)
    lists.refuse_long(name, positions, prompts)
    windows = sizes.windows(index.records["duration_ms"])
    batches = _batches(windows, positions, settings)
    new_tokens = np.ceil(settings.max_tokens_per_second * index.duration_seconds) + MIN_NEW_TOKENS
    return [
        TestSet(
            name=name if size is None else f"{name}-distractors-{size}",
            index=index,
            reader=UtteranceReader(
                index,
                prompts,
                max_target_tokens=None,
                storage=storage,
                takes_all=True,
                prompting=Prompting(
                    untagged_fraction=float(config.detect_language),
                    contexts=lists.contexts(size),
                    target_text=tuple(target_text),
                ),
                kept_fields=grouping.fields,
            ),
            batches=batches,
            decoding_shapes=_decoding_shapes(
                batches,
                windows,
                positions - index.records["num_text_tokens"] + lists.positions(size, index.records),
                new_tokens.astype(np.int64),
                # A target more than text tokens: `</s>`.
                index.records["num_text_tokens"].astype(np.int64) + 1,
            ),
            has_answers=has_answers,
            words=lists.words,
            num_distractors=size,
            grouping=grouping,
        )
        for size in (None, *lists.sizes)
    ]


@dataclass(frozen=True)
class _Lists:
    """The lists of words in the prompts of a test set.

    sizes: numbers of distractors, one for each kind of list. entry_tokens: tokens of each listed word, longest first.
    """

    words: WordList | None = None
    sizes: tuple[int, ...] = ()
    entry_tokens: tuple[int, ...] = ()

    @classmethod
    def read(cls, name: str, config: TestSetConfig, prompts: VoxtralPrompts) -> _Lists:
        if config.context is None:
            return cls()
        words = WordList.read(config.context.words, f"evaluation.test_sets.{name}.context.words")
        entry_tokens = sorted((len(prompts.encode(f", {entry}")) for entry in words.entries), reverse=True)
        return cls(words, config.context.num_distractors, tuple(entry_tokens))

    def contexts(self, size: int | None) -> TestContexts | None:
        if size is None or self.words is None:
            return None
        return TestContexts(self.words, size, max(self.sizes))

    def positions(self, size: int | None, records: Records) -> Ids:
        """Estimated positions of each utterance's list: the longest distractors, its own words and commas."""
        if size is None:
            return np.zeros(len(records), dtype=np.int64)
        return 2 * text_tokens(records) + sum(self.entry_tokens[:size])

    def refuse_long(self, name: str, positions: Ids, prompts: VoxtralPrompts) -> None:
        """Refuse lists that may not fit beside the longest utterance, judged by the longest words."""
        size = max(self.sizes, default=0)
        room = prompts.max_positions - MIN_NEW_TOKENS - int(positions.max())
        needed = sum(self.entry_tokens[:size])
        if self.words is not None and needed > room:
            raise UserError(
                f"`evaluation.test_sets.{name}.context.num_distractors`: {counted(size, 'word')} may take "
                f"{counted(needed, 'position')}, but the longest utterance leaves {room} of the model's "
                f"{prompts.max_positions}: lower it."
            )


def _batches(windows: Ids, positions: Ids, settings: EvaluationConfig) -> tuple[Batch, ...]:
    """Batches of utterances of similar cost, the most expensive first, so that ranks finish at about the same time."""
    order = (-positions).argsort(kind="stable")
    budget = Budget(settings.batch_size, settings.max_windows, None)
    return tuple(tuple(order[run].tolist()) for run in cut_micro_batches(windows[order], positions[order], budget))


def _decoding_shapes(
    batches: Sequence[Batch], windows: Ids, prompt_tokens: Ids, new_tokens: Ids, target_tokens: Ids
) -> tuple[DecodingShape, ...]:
    """The different sizes of batches, from the windows and tokens of each utterance."""
    tokens = (prompt_tokens, new_tokens, target_tokens)
    shapes = (
        DecodingShape(len(ids), int(windows[ids].sum()), *(int(each[ids].max()) for each in tokens))
        for ids in map(list, batches)
    )
    return tuple(dict.fromkeys(shapes))


def _has_answers(name: str, index: ShardIndex, config: TestSetConfig) -> bool:
    kinds = {part.layout.instruction is not None for part in index.sets}
    if len(kinds) > 1:
        raise UserError(
            f"`evaluation.test_sets.{name}`: some of its shards hold transcripts, and some answers to instructions: "
            "put them into separate test sets."
        )
    if kinds == {True} and (config.detect_language or config.context is not None):
        raise UserError(
            f"`evaluation.test_sets.{name}`: its texts are answers to instructions, whose prompts have no language and "
            "no list of words: remove `detect_language` and `context`."
        )
    return kinds == {True}


def _refuse_too_long(name: str, index: ShardIndex, positions: Ids, prompts: VoxtralPrompts) -> None:
    needed = positions + MIN_NEW_TOKENS
    too_long = np.flatnonzero(needed > prompts.max_positions)
    if len(too_long):
        longest = int(too_long[needed[too_long].argmax()])
        raise UserError(
            f"`evaluation.test_sets.{name}`: {counted(len(too_long), 'utterance')} with more than the model's "
            f"{counted(prompts.max_positions, 'position')}; the longest (#{longest}, "
            f"{index.duration_seconds[longest]:.0f} s) needs {needed[longest]}: split their recordings."
        )


def refuse_different_test_sets(test_sets: Sequence[TestSet], world: World) -> None:
    """Refuse ranks that see different utterances, which would hang or give a wrong rate.

    Raises:
        UserError: the shards or words of a test set on some rank differ from those on rank 0.
    """
    for test_set in test_sets:
        different = ranks_unlike_first(test_set.fingerprint, world)
        if different:
            raise UserError(
                f"`evaluation.test_sets.{test_set.name}`: rank {different[0]} sees other shards, another index or "
                "other words than rank 0: copy them to all nodes again, or use shared storage."
            )
