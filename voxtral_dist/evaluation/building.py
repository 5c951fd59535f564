"""Test sets decoded over ranks, gathered, checked to be whole, and scored."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.config import EvaluationConfig, TestSetConfig, TextStep
from voxtral_dist.data.examples.bad_utterance import UtteranceError
from voxtral_dist.data.examples.example import Example
from voxtral_dist.data.examples.prompting import Prompting, TestContexts
from voxtral_dist.data.examples.reader import UtteranceReader
from voxtral_dist.data.plan.cutting import Budget, cut_micro_batches
from voxtral_dist.data.plan.example_sizes import ExampleSizes, text_tokens
from voxtral_dist.data.stored.index import ShardIndex, read_index
from voxtral_dist.data.stored.shard_set import Ids, Records
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.distributed.collectives import (
    from_first_rank,
    gather_on_first,
    max_over_ranks,
    ranks_unlike_first,
    sum_over_ranks,
)
from voxtral_dist.distributed.world import World
from voxtral_dist.errors import RankError, UserError
from voxtral_dist.evaluation.batch_decoder import MIN_NEW_TOKENS, BatchDecoder, Hypothesis
from voxtral_dist.evaluation.decoding import Batch, Decoded, decode_batches
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.scoring.normalizer import Normalizer
from voxtral_dist.scoring.results import Measurements, TestSetScore, score_test_set, write_results
from voxtral_dist.scoring.slices import Grouping
from voxtral_dist.scoring.utterances import DecodedUtterance, ScoredUtterance, score_utterance
from voxtral_dist.text.word_list import WordList

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TestSet:
    """The utterances of one index and how they are read.

    batches: of sample ids, expensive ones first. most_positions: of a batch in the language model, padding and new
    tokens included. has_answers: whether its texts are answers to instructions. words: those whose B-WER is measured.
    num_distractors: of the lists in the prompts; None gives no lists. grouping: what has rates of its own.
    """

    __test__ = False  # pytest takes it for a test

    name: str
    index: ShardIndex
    reader: UtteranceReader
    batches: tuple[Batch, ...]
    most_positions: int
    has_answers: bool = False
    words: WordList | None = None
    num_distractors: int | None = None
    grouping: Grouping = field(default_factory=Grouping)

    @property
    def fingerprint(self) -> str:
        """The same for the same utterances and words, and practically no others."""
        shards = [(part.fingerprint, len(part.records)) for part in self.index.sets]
        words = "" if self.words is None else self.words.fingerprint
        return hashlib.sha256(repr((shards, len(self.index), words)).encode()).hexdigest()

    def read(self, batch: Batch) -> list[Example]:
        """The examples of a batch.

        Raises:
            RankError: one is unusable; a smaller test set would be another test set.
        """
        try:
            return [self.reader.example(utterance_id) for utterance_id in batch]
        except UtteranceError as error:
            raise RankError(
                f"The test set `{self.name}` has an unusable utterance: {error}. Mend or remove it, then pack the set "
                "again."
            ) from error


def refuse_different_test_sets(test_sets: Sequence[TestSet], world: World) -> None:
    """Refuse ranks that would decode different utterances, or wait for batches that others do not have.

    Raises:
        UserError: a rank sees other shards of a test set than rank 0, or other words.
    """
    for test_set in test_sets:
        different = ranks_unlike_first(test_set.fingerprint, world)
        if different:
            raise UserError(
                f"`evaluation.test_sets.{test_set.name}`: rank {different[0]} sees other shards than rank 0, another "
                "index of them, or other words: copy them to all nodes again, or put them on storage that all share."
            )


def build_test_sets(
    config: EvaluationConfig,
    prompts: VoxtralPrompts,
    target_text: Sequence[TextStep],
    storage: Storage | None = None,
) -> list[TestSet]:
    """All configured test sets, each cut into batches of similar cost, longest first.

    A set with lists of words comes once without a list, under its own name, and once for each size of the lists.
    `target_text` makes the targets of the loss, as in training; references stay as they are.
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
            f"`evaluation.test_sets`: the name `{twice}` is that of a set and of lists of words too: rename the set."
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
    """One test set, and the same with lists of words in the prompts.

    Raises:
        UserError: its shards are missing or empty, an utterance is too long for the model, or its words cannot be read.
    """
    grouping = Grouping.of(settings)
    index = read_index([config.shards], storage)
    if config.max_utterances is not None:
        index = index.first(config.max_utterances)
    has_answers = _has_answers(name, index, config)
    words: WordList | None = None
    sizes: tuple[int, ...] = ()
    # Tokens of each listed word in a prompt, the longest first.
    entry_tokens: list[int] = []
    if config.context is not None:
        words = WordList.read(config.context.words, f"evaluation.test_sets.{name}.context.words")
        sizes = config.context.num_distractors
    sizes_of_examples = ExampleSizes.of(prompts)
    positions = sizes_of_examples.positions_of(index.records)
    _refuse_too_long(name, index, positions, prompts)
    if words is not None:
        entry_tokens = sorted((len(prompts.encode(f", {entry}")) for entry in words.entries), reverse=True)
        _refuse_long_lists(name, entry_tokens, max(sizes, default=0), positions, prompts)
    windows = sizes_of_examples.windows(index.records["duration_ms"])
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
                    contexts=None if size is None or words is None else TestContexts(words, size, max(sizes)),
                    target_text=tuple(target_text),
                ),
                kept_fields=grouping.fields,
            ),
            batches=batches,
            most_positions=_most_positions(
                batches, positions + new_tokens + _list_positions(entry_tokens, size, index.records)
            ),
            has_answers=has_answers,
            words=words,
            num_distractors=size,
            grouping=grouping,
        )
        for size in (None, *sizes)
    ]


def _batches(windows: Ids, positions: Ids, settings: EvaluationConfig) -> tuple[Batch, ...]:
    """Samples of similar cost together, the most expensive first, so that ranks finish together."""
    order = (-positions).argsort(kind="stable")
    budget = Budget(settings.batch_size, settings.max_windows, None)
    return tuple(tuple(order[run].tolist()) for run in cut_micro_batches(windows[order], positions[order], budget))


def _has_answers(name: str, index: ShardIndex, config: TestSetConfig) -> bool:
    kinds = {part.layout.instruction is not None for part in index.sets}
    if len(kinds) > 1:
        raise UserError(
            f"`evaluation.test_sets.{name}`: some of its shards hold transcripts, and some answers to instructions: "
            "give them sets of their own."
        )
    if kinds == {True} and (config.detect_language or config.context is not None):
        raise UserError(
            f"`evaluation.test_sets.{name}`: its texts are answers to instructions, whose prompts have no language and "
            "no list of words: leave out `detect_language` and `context`."
        )
    return kinds == {True}


def _refuse_long_lists(
    name: str, entry_tokens: Sequence[int], num_distractors: int, positions: Ids, prompts: VoxtralPrompts
) -> None:
    """Refuse lists that may take more positions than the longest utterance leaves, judged by the longest words."""
    room = prompts.max_positions - MIN_NEW_TOKENS - int(positions.max())
    needed = sum(entry_tokens[:num_distractors])
    if needed > room:
        raise UserError(
            f"`evaluation.test_sets.{name}.context.num_distractors`: {num_distractors} words may take {needed} "
            f"positions, but the longest utterance leaves {room} of the model's {prompts.max_positions}: ask for fewer."
        )


def _list_positions(entry_tokens: Sequence[int], num_distractors: int | None, records: Records) -> Ids:
    """About so many positions are of an utterance's list: the longest distractors, and words that its text has."""
    if num_distractors is None:
        return np.zeros(len(records), dtype=np.int64)
    return text_tokens(records) + sum(entry_tokens[:num_distractors])


def _most_positions(batches: Sequence[Batch], positions: NDArray[np.float64]) -> int:
    """Of a batch, padding included."""
    return max(len(batch) * int(positions[list(batch)].max()) for batch in batches)


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
    test_set: TestSet,
    decoder: BatchDecoder,
    settings: EvaluationConfig,
    used: Normalizer,
    out_dir: Path,
    world: World,
) -> TestSetScore:
    """Decode every utterance once over all ranks and write the results; every rank gets the score.

    Raises:
        SharedError: an utterance of the test set is unusable, or a rank could not decode it.
        RankError: on rank 0, if the results are not whole or cannot be written.
    """
    if test_set.has_answers:
        # The steps of target text are for transcripts.
        used = replace(used, target_text=())
    decoded = decode_batches(test_set.name, test_set.batches, test_set.read, decoder, settings.measures_loss, world)
    measured = _over_ranks(decoded, world)
    mine = [score_utterance(_utterance(test_set, *pair), used, test_set.words) for pair in decoded.pairs]
    gathered = gather_on_first(mine, world)
    score = None
    if world.is_first:
        utterances = check_whole(test_set, [utterance for part in gathered for utterance in part])
        for name in test_set.grouping.unknown_in(utterances):
            log.warning(
                "No utterance of `%s` has the field `%s`, which slices or intervals ask for.", test_set.name, name
            )
        score = score_test_set(utterances, used, test_set.num_distractors, test_set.grouping, measured)
        _write(out_dir, test_set.name, utterances, score)
    agreed = from_first_rank(score, world)
    assert agreed is not None, "rank 0 always has a score"
    return agreed


def _write(out_dir: Path, name: str, utterances: Sequence[ScoredUtterance], score: TestSetScore) -> None:
    try:
        write_results(out_dir, name, utterances, score)
    except OSError as error:
        raise RankError(f"The results of `{name}` cannot be written to {out_dir}: {error.strerror}.") from error


def _over_ranks(decoded: Decoded, world: World) -> Measurements:
    """What all ranks measured together: the seconds of the slowest, and the loss of all targets."""
    milliseconds = max_over_ranks([round(1000 * decoded.seconds)], world)[0]
    loss_sum, num_target_tokens = sum_over_ranks([decoded.loss_sum, decoded.num_target_tokens], world)
    return Measurements(milliseconds / 1000, loss_sum / num_target_tokens if num_target_tokens else None)


def check_whole(test_set: TestSet, utterances: Sequence[ScoredUtterance]) -> list[ScoredUtterance]:
    """The utterances in the order of the index.

    Raises:
        RankError: one is missing or came twice, so that any rate of them would be wrong.
    """
    counts = Counter(utterance.utterance_id for utterance in utterances)
    unknown = [utterance_id for utterance_id in counts if not 0 <= utterance_id < len(test_set.index)]
    missing = [utterance_id for utterance_id in range(len(test_set.index)) if utterance_id not in counts]
    repeated = [utterance_id for utterance_id, count in counts.items() if count > 1]
    if missing or repeated or unknown:
        raise RankError(
            f"The evaluation of `{test_set.name}` lost {len(missing)} utterances (first: {missing[:3]}), decoded "
            f"{len(repeated)} twice (first: {repeated[:3]}) and {len(unknown)} that it does not have (first: "
            f"{unknown[:3]}): its word error rate would be wrong, so there is none."
        )
    return sorted(utterances, key=lambda utterance: utterance.utterance_id)


def _utterance(test_set: TestSet, example: Example, hypothesis: Hypothesis) -> DecodedUtterance:
    return DecodedUtterance(
        utterance_id=example.utterance_id,
        key=example.key,
        language=test_set.index.language(example.utterance_id),
        duration_seconds=round(example.duration_seconds, 4),
        reference=example.reference,
        hypothesis=hypothesis.text,
        hit_limit=hypothesis.hit_limit,
        detected_language=hypothesis.detected_language,
        asks_for_language=example.is_transcription and example.is_untagged,
        context=example.context,
        fields=example.fields,
    )
