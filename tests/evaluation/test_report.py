"""Every utterance is scored exactly once, and the report adds up."""

import json
from itertools import pairwise

import pytest

from voxtral_dist.config import TestSetConfig as ShardsToTest  # under its own name pytest would collect it
from voxtral_dist.data.storage import Storage
from voxtral_dist.errors import RankError
from voxtral_dist.evaluation.normalizer import normalizer
from voxtral_dist.evaluation.report import (
    DecodedUtterance,
    ScoredUtterance,
    score_test_set,
    score_utterance,
    write_results,
)
from voxtral_dist.evaluation.test_sets import build_test_set, check_whole
from voxtral_dist.evaluation.word_errors import ErrorCounts

BASIC = normalizer("basic")

# Reference, hypothesis, language.
PAIRS = (
    ("One, two three.", "one too three", "en"),
    ("Vier fünf", "", "de"),
    ("six", "six", None),
    ("seven", "Seven!", "en"),
    ("eight", "...", "en"),
)


def scored(sample_id: int, reference: str = "a", hypothesis: str = "a", language: str | None = "en") -> ScoredUtterance:
    decoded = DecodedUtterance(
        sample_id=sample_id,
        key=f"key-{sample_id}",
        language=language,
        duration_seconds=1.5,
        reference=reference,
        hypothesis=hypothesis,
        hit_limit=sample_id == 1,
    )
    return score_utterance(decoded, BASIC)


@pytest.fixture
def utterances() -> list[ScoredUtterance]:
    return [scored(number, *pair) for number, pair in enumerate(PAIRS)]


def test_texts_are_compared_normalized_and_kept_as_they_were(utterances):
    first = utterances[0]
    assert (first.reference, first.hypothesis) == PAIRS[0][:2]
    assert first.words == ErrorCounts(substitutions=1, reference_length=3)
    assert first.characters.reference_length == len("one two three")
    assert utterances[3].words.errors == 0


def test_a_score_sums_counts_over_utterances_and_divides_once(utterances):
    score = score_test_set(utterances, BASIC)
    assert score.words == ErrorCounts(substitutions=1, deletions=3, insertions=0, reference_length=8)
    assert score.wer == 4 / 8
    assert score.cer == score.characters.errors / sum(len(BASIC.apply(reference)) for reference, *_ in PAIRS)
    assert score.wer_interval[0] <= score.wer <= score.wer_interval[1]
    assert (score.num_utterances, score.num_limit_hits, score.audio_seconds) == (5, 1, 7.5)
    assert score.num_empty_hypotheses == 1
    assert score.wer_by_language == {"de": 1.0, "en": 2 / 5, "unknown": 0.0}
    assert score.normalizer == BASIC.label


def test_a_score_does_not_depend_on_the_order(utterances):
    one, other = score_test_set(utterances, BASIC), score_test_set(utterances[::-1], BASIC)
    assert (one.wer, one.cer, one.words, one.wer_by_language) == (
        other.wer,
        other.cer,
        other.words,
        other.wer_by_language,
    )


def test_a_test_set_without_words_has_no_rate():
    score = score_test_set([scored(0, "?", "!")], BASIC)
    assert (score.wer, score.wer_interval, score.cer, score.num_utterances) == (None, None, None, 1)


def test_results_on_disk_add_up_to_the_score(utterances, tmp_path):
    score = score_test_set(utterances, BASIC)
    write_results(tmp_path / "made" / "here", "name", utterances, score)
    rows = [json.loads(line) for line in (tmp_path / "made/here/name.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((tmp_path / "made/here/name.json").read_text(encoding="utf-8"))
    assert [(row["reference"], row["hypothesis"], row["language"]) for row in rows] == list(PAIRS)
    assert [row["key"] for row in rows] == [utterance.key for utterance in utterances]
    for kind, rate in (("word", "wer"), ("character", "cer")):
        errors = sum(row[f"{kind}_{edit}"] for row in rows for edit in ("substitutions", "deletions", "insertions"))
        assert summary[rate] == errors / sum(row[f"{kind}_reference_length"] for row in rows)
    assert summary["normalizer"] == BASIC.label
    assert summary["num_utterances"] == len(rows)


@pytest.fixture(scope="module")
def held_out(shard_folder, prompts):
    return build_test_set("held_out", ShardsToTest(shards=str(shard_folder), max_utterances=7), 3, prompts, Storage())[
        0
    ]


def test_batches_hold_every_utterance_once_longest_first(held_out):
    batches = held_out.batches
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert sorted(sample_id for batch in batches for sample_id in batch) == list(range(7))
    windows = [[-(-held_out.index.duration_seconds[sample_id] // 1.28) for sample_id in batch] for batch in batches]
    assert all(max(later) <= min(earlier) for earlier, later in pairwise(windows))


def test_a_whole_test_set_comes_back_in_the_order_of_the_index(held_out):
    shuffled = [scored(sample_id) for sample_id in (4, 0, 6, 2, 1, 5, 3)]
    assert [utterance.sample_id for utterance in check_whole(held_out, shuffled)] == list(range(7))


@pytest.mark.parametrize(
    ("sample_ids", "sentence"),
    [
        ([0, 1, 2, 3, 4, 5], r"lost 1 utterances \(first: \[6\]\)"),
        ([], "lost 7 utterances"),
        ([0, 1, 2, 3, 4, 5, 6, 6], r"decoded 1 twice \(first: \[6\]\)"),
        ([0, 1, 2, 3, 4, 5, 5], r"lost 1 utterances"),
        ([0, 1, 2, 3, 4, 5, 6, 7], "held_out"),
        ([-1, 0, 1, 2, 3, 4, 5, 6], "held_out"),
    ],
)
def test_other_ids_than_those_of_the_index_give_no_rate(held_out, sample_ids, sentence):
    with pytest.raises(RankError, match=sentence):
        check_whole(held_out, [scored(sample_id) for sample_id in sample_ids])
