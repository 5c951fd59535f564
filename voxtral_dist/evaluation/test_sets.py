"""Test sets decoded over ranks, gathered, checked to be whole, and scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from voxtral_dist.config import EvaluationConfig, TestSetConfig
from voxtral_dist.data.context import TestContexts, WordList
from voxtral_dist.data.filters import ExampleSizes
from voxtral_dist.data.index import Ids, ShardIndex, read_index
from voxtral_dist.data.prompting import Prompting
from voxtral_dist.data.prompts import VoxtralPrompts
from voxtral_dist.data.samples import SampleError, SampleReader
from voxtral_dist.data.storage import Storage
from voxtral_dist.distributed.collectives import from_first_rank, gather_on_first
from voxtral_dist.distributed.world import World
from voxtral_dist.errors import RankError, UserError
from voxtral_dist.evaluation.normalizer import Normalizer
from voxtral_dist.evaluation.report import (
    DecodedUtterance,
    ScoredUtterance,
    TestSetScore,
    score_test_set,
    score_utterance,
    write_results,
)
from voxtral_dist.evaluation.transcribe import MIN_NEW_TOKENS, Transcriber

# References of any length can be scored.
_NO_TARGET_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class TestSet:
    """The utterances of one index and how they are read.

    words: those whose B-WER is measured. num_distractors: of the lists in the prompts; None gives no lists.
    """

    __test__ = False  # pytest takes it for a test

    name: str
    index: ShardIndex
    reader: SampleReader
    batches: tuple[tuple[int, ...], ...]
    words: WordList | None = None
    num_distractors: int | None = None


def build_test_sets(config: EvaluationConfig, prompts: VoxtralPrompts, storage: Storage | None = None) -> list[TestSet]:
    """All configured test sets, each cut into batches of similar cost, longest first.

    A set with lists of words comes once without a list, under its own name, and once for each size of the lists.
    """
    return [
        sized
        for name, test_set in config.test_sets.items()
        for sized in build_test_set(name, test_set, config.batch_size, prompts, storage or Storage())
    ]


def build_test_set(
    name: str, config: TestSetConfig, batch_size: int, prompts: VoxtralPrompts, storage: Storage
) -> list[TestSet]:
    """One test set, and the same with lists of words in the prompts.

    Raises:
        UserError: its shards are missing or empty, an utterance is too long for the model, or its words cannot be read.
    """
    index = read_index([config.shards], storage)
    if config.max_utterances is not None:
        index = index.first(config.max_utterances)
    positions = ExampleSizes.of(prompts).positions_of(index.records)
    _refuse_too_long(name, index, positions, prompts)
    order = (-positions).argsort(kind="stable").tolist()
    batches = tuple(tuple(order[first : first + batch_size]) for first in range(0, len(order), batch_size))
    words: WordList | None = None
    sizes: tuple[int, ...] = ()
    if config.context is not None:
        words = WordList.read(config.context.words, f"evaluation.test_sets.{name}.context.words")
        sizes = config.context.num_distractors
    return [
        TestSet(
            name=name if size is None else f"{name}-distractors-{size}",
            index=index,
            reader=SampleReader(
                index,
                prompts,
                _NO_TARGET_LIMIT,
                storage,
                max_chars_per_second=None,
                prompting=Prompting(
                    untagged_fraction=float(config.detect_language),
                    contexts=None if size is None or words is None else TestContexts(words, size, max(sizes)),
                ),
            ),
            batches=batches,
            words=words,
            num_distractors=size,
        )
        for size in (None, *sizes)
    ]


def _refuse_too_long(name: str, index: ShardIndex, positions: Ids, prompts: VoxtralPrompts) -> None:
    needed = positions + MIN_NEW_TOKENS
    too_long = np.flatnonzero(needed > prompts.max_positions)
    if len(too_long):
        longest = int(too_long[needed[too_long].argmax()])
        raise UserError(
            f"`evaluation.test_sets.{name}`: {len(too_long)} utterances take more positions than the "
            f"{prompts.max_positions} of the model, the longest (#{longest}, {index.duration_seconds[longest]:.0f} s) "
            f"{needed[longest]}: cut their recordings into shorter ones."
        )


def evaluate_test_set(
    test_set: TestSet, transcriber: Transcriber, used: Normalizer, out_dir: Path, world: World
) -> TestSetScore:
    """Decode every utterance once over all ranks and write the results; every rank gets the score.

    Ranks decode without waiting for each other: batch i belongs to rank i modulo the number of ranks.

    Raises:
        RankError: an utterance of the test set is unusable; a smaller test set would be another test set.
    """
    mine = [_decode(test_set, batch, transcriber, used) for batch in test_set.batches[world.rank :: world.size]]
    gathered = gather_on_first([utterance for batch in mine for utterance in batch], world)
    score = None
    if world.is_first:
        utterances = check_whole(test_set, [utterance for part in gathered for utterance in part])
        score = score_test_set(utterances, used, test_set.num_distractors)
        write_results(out_dir, test_set.name, utterances, score)
    agreed = from_first_rank(score, world)
    assert agreed is not None, "rank 0 always has a score"
    return agreed


def check_whole(test_set: TestSet, utterances: Sequence[ScoredUtterance]) -> list[ScoredUtterance]:
    """The utterances in the order of the index.

    Raises:
        RankError: one is missing or came twice, so that any rate of them would be wrong.
    """
    counts = Counter(utterance.sample_id for utterance in utterances)
    unknown = [sample_id for sample_id in counts if not 0 <= sample_id < len(test_set.index)]
    missing = [sample_id for sample_id in range(len(test_set.index)) if sample_id not in counts]
    repeated = [sample_id for sample_id, count in counts.items() if count > 1]
    if missing or repeated or unknown:
        raise RankError(
            f"The evaluation of `{test_set.name}` lost {len(missing)} utterances (first: {missing[:3]}), decoded "
            f"{len(repeated)} twice (first: {repeated[:3]}) and {len(unknown)} that it does not have (first: "
            f"{unknown[:3]}): its word error rate would be wrong, so there is none."
        )
    return sorted(utterances, key=lambda utterance: utterance.sample_id)


def _decode(
    test_set: TestSet, batch: Sequence[int], transcriber: Transcriber, used: Normalizer
) -> list[ScoredUtterance]:
    try:
        examples = [test_set.reader.example(sample_id) for sample_id in batch]
    except SampleError as error:
        raise RankError(
            f"The test set `{test_set.name}` has an unusable utterance: {error}. Mend or remove it, then "
            "pack the set again."
        ) from error
    return [
        score_utterance(
            DecodedUtterance(
                sample_id=example.sample_id,
                key=example.key,
                language=test_set.index.language(example.sample_id),
                duration_seconds=round(example.duration_seconds, 4),
                reference=example.reference,
                hypothesis=hypothesis.text,
                hit_limit=hypothesis.hit_limit,
                detected_language=hypothesis.detected_language,
                asks_for_language=example.is_transcription and example.is_untagged,
                context=example.context,
            ),
            used,
            test_set.words,
        )
        for example, hypothesis in zip(examples, transcriber(examples), strict=True)
    ]
