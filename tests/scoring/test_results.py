"""Every utterance is scored exactly once, and the report adds up."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import soundfile

from voxtral_dist.config import EvaluationConfig
from voxtral_dist.config import TestSetConfig as ShardsToTest  # under its own name pytest would collect it
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.errors import RankError
from voxtral_dist.evaluation.building import build_test_set
from voxtral_dist.evaluation.evaluating import check_complete
from voxtral_dist.scoring.grouping import Grouping
from voxtral_dist.scoring.hypotheses import read_scored
from voxtral_dist.scoring.normalizer import normalizer
from voxtral_dist.scoring.result_files import read_result, write_results
from voxtral_dist.scoring.results import (
    BiasedErrors,
    LanguageIdentification,
    Measurements,
    score_test_set,
)
from voxtral_dist.scoring.utterances import DecodedUtterance, ScoredUtterance, score_utterance
from voxtral_dist.scoring.word_errors import ErrorCounts
from voxtral_dist.text.word_list import WordList

from corpora import pack_manifest, tone, write_lines

BASIC = normalizer("basic")

# Reference, hypothesis, language.
PAIRS = (
    ("One, two three.", "one too three", "en"),
    ("Vier fünf", "", "de"),
    ("six", "six", None),
    ("seven", "Seven!", "en"),
    ("eight", "...", "en"),
)


def decoded(
    utterance_id: int, reference: str = "a", hypothesis: str = "a", language: str | None = "en"
) -> DecodedUtterance:
    return DecodedUtterance(
        utterance_id=utterance_id,
        key=f"key-{utterance_id}",
        language=language,
        duration_seconds=1.5,
        reference=reference,
        hypothesis=hypothesis,
        hit_limit=utterance_id == 1,
    )


def scored(
    utterance_id: int, reference: str = "a", hypothesis: str = "a", language: str | None = "en"
) -> ScoredUtterance:
    return score_utterance(decoded(utterance_id, reference, hypothesis, language), BASIC)


@pytest.fixture
def utterances() -> list[ScoredUtterance]:
    return [scored(number, *pair) for number, pair in enumerate(PAIRS)]


def test_texts_are_compared_normalized_and_kept_as_they_were(utterances):
    first = utterances[0]
    assert (first.decoded.reference, first.decoded.hypothesis) == PAIRS[0][:2]
    assert first.words == ErrorCounts(substitutions=1, reference_length=3)
    assert first.characters.reference_length == len("one two three")
    assert utterances[3].words.errors == 0


def test_a_score_sums_counts_over_utterances_and_divides_once(utterances):
    score = score_test_set(utterances, BASIC)
    rates = score.normalized
    assert rates.words == ErrorCounts(substitutions=1, deletions=3, insertions=0, reference_length=8)
    assert rates.wer == 4 / 8
    assert rates.cer == rates.characters.errors / sum(len(BASIC.apply(reference)) for reference, *_ in PAIRS)
    assert rates.wer_interval[0] <= rates.wer <= rates.wer_interval[1]
    assert (rates.num_utterances, score.num_limit_hits, rates.audio_seconds) == (5, 1, 7.5)
    assert score.num_empty_hypotheses == 1
    assert {language: part.wer for language, part in score.slices["language"].items()} == {
        "de": 1.0,
        "en": 2 / 5,
        "unknown": 0.0,
    }
    assert score.normalizer == BASIC.label


def test_case_and_punctuation_count_in_the_orthographic_rates(utterances):
    exact = score_test_set(utterances, BASIC).orthographic
    # `One, two three.` against `one too three`, a deletion of two words, `seven` and `Seven!`, `eight` and `...`.
    assert exact.words == ErrorCounts(substitutions=5, deletions=2, reference_length=8)
    assert exact.wer == 7 / 8
    assert exact.characters.reference_length == sum(len(reference) for reference, *_ in PAIRS)
    whole = score_test_set(utterances, BASIC)
    assert exact.cer > whole.normalized.cer
    assert whole.orthographic_normalizer == "none-1"
    raw = normalizer("none")
    same = score_test_set([score_utterance(decoded(number, *pair), raw) for number, pair in enumerate(PAIRS)], raw)
    assert same.normalized == exact


def test_references_that_are_empty_after_normalization_are_counted_with_what_was_inserted():
    utterances = [scored(0, "...", "one two"), scored(1, "one two three four", "one two three four")]
    score = score_test_set(utterances, BASIC)
    assert (score.num_empty_references, score.normalized.words.insertions, score.normalized.wer) == (1, 2, 2 / 4)


def test_what_was_measured_while_decoding_is_passed_on(utterances):
    score = score_test_set(utterances, BASIC, measured=Measurements(decode_seconds=3.0, loss=0.5))
    assert (score.rtfx, score.measured.loss, score.measured.perplexity) == (7.5 / 3, 0.5, math.exp(0.5))
    assert {"rtfx": 2.5, "loss": 0.5}.items() <= score.metrics().items()
    unmeasured = score_test_set(utterances, BASIC)
    assert unmeasured.measured == Measurements(None, None)
    assert (unmeasured.rtfx, unmeasured.measured.perplexity) == (None, None)
    assert not {"rtfx", "loss", "perplexity"} & unmeasured.metrics().keys()


def test_hypotheses_that_got_stuck_are_counted():
    utterances = [scored(0, "so it goes", "So " + "it goes, " * 6), scored(1)]
    score = score_test_set(utterances, BASIC)
    assert [one.has_repetition_loop for one in utterances] == [True, False]
    assert score.num_repetition_loops == score.metrics()["num_repetition_loops"] == 1


def test_a_score_does_not_depend_on_the_order(utterances):
    one, other = score_test_set(utterances, BASIC), score_test_set(utterances[::-1], BASIC)
    assert (one.normalized.words, one.normalized.characters) == (other.normalized.words, other.normalized.characters)
    assert (one.normalized.wer, one.normalized.cer) == (other.normalized.wer, other.normalized.cer)
    rates = [
        {label: part.wer for part_of in score.slices.values() for label, part in part_of.items()}
        for score in (one, other)
    ]
    assert rates[0] == rates[1]


def detected(number: int, language: str | None, named: str | None, asked: bool = True) -> ScoredUtterance:
    one = scored(number, language=language)
    return replace(one, decoded=replace(one.decoded, detected_language=named, asks_for_language=asked))


def test_detected_languages_are_counted_where_they_were_asked_for_and_are_known():
    found = [("en", "en"), ("en", "de"), ("de", "de"), ("de", None), (None, "en")]
    utterances = [detected(number, *pair) for number, pair in enumerate(found)]
    identified = score_test_set(utterances, BASIC).language_identification
    assert (identified, identified.accuracy) == (LanguageIdentification(4, 2, 1), 0.5)
    told = [detected(number, language, None, asked=False) for number, (language, _) in enumerate(found)]
    assert score_test_set(told, BASIC).language_identification is None
    assert "language accuracy 50.00 %" in str(score_test_set(utterances, BASIC))
    assert score_test_set(utterances, BASIC).metrics()["language_accuracy"] == 0.5


def test_listed_words_have_a_rate_of_their_own_and_the_rest_another():
    pairs = [("call siobhan now", "call chevon now please"), ("siobhan", "siobhan"), ("not now", "now")]
    utterances = [
        score_utterance(decoded(number, *pair), BASIC, WordList(["Siobhan"])) for number, pair in enumerate(pairs)
    ]
    score = score_test_set(utterances, BASIC, num_distractors=7)
    assert score.biased == BiasedErrors(7, ErrorCounts(1, 0, 0, 2), ErrorCounts(0, 1, 1, 4))
    assert (score.biased.biased_wer, score.biased.unbiased_wer) == (1 / 2, 2 / 4)
    assert score.normalized.wer == 3 / 6
    assert score.metrics()["biased_wer"] == 0.5
    assert score_test_set([scored(0)], BASIC).biased is None


def test_the_steps_of_target_text_come_before_the_normalizer_and_are_named():
    lowered = normalizer("none", ("lower_case", "no_punctuation"))
    assert lowered.label == "lower_case+no_punctuation+none-1"
    assert lowered.apply("Hello,  World") == "hello world"
    assert lowered.orthographic.label == "lower_case+no_punctuation+none-1"
    assert normalizer("basic", ("lower_case",)).orthographic.apply("Hello,  World") == "hello, world"
    assert normalizer("none").apply("Hello,  World") == "Hello, World"


def test_a_test_set_without_words_has_no_rate():
    rates = score_test_set([scored(0, "?", "!")], BASIC).normalized
    assert (rates.wer, rates.wer_interval, rates.cer, rates.num_utterances) == (None, None, None, 1)


def test_results_on_disk_add_up_to_the_score(utterances, tmp_path):
    score = score_test_set(utterances, BASIC)
    write_results(tmp_path / "made" / "here", "name", utterances, score)
    rows = [json.loads(line) for line in (tmp_path / "made/here/name.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((tmp_path / "made/here/name.json").read_text(encoding="utf-8"))
    assert [(row["reference"], row["hypothesis"], row["language"]) for row in rows] == list(PAIRS)
    assert [row["key"] for row in rows] == [utterance.decoded.key for utterance in utterances]
    for kind, rate, score_of in (
        ("word", "wer", summary),
        ("character", "cer", summary),
        ("orthographic_word", "wer", summary["orthographic"]),
        ("orthographic_character", "cer", summary["orthographic"]),
    ):
        errors = sum(row[f"{kind}_{edit}"] for row in rows for edit in ("substitutions", "deletions", "insertions"))
        assert score_of[rate] == errors / sum(row[f"{kind}_reference_length"] for row in rows)
    assert summary["normalizer"] == BASIC.label
    assert summary["num_utterances"] == len(rows)


def test_fields_of_samples_that_slices_need_reach_the_examples(shard_folder, prompts):
    config = ShardsToTest(shards=str(shard_folder))
    settings = EvaluationConfig(slices=("lang", "nothing"))
    asked = build_test_set("held_out", config, settings, prompts, (), Storage())[0]
    index = asked.index
    for utterance_id in range(4):
        example = asked.reader.example(utterance_id)
        stored = asked.reader.read(utterance_id).fields
        assert example.fields == {name: stored[name] for name in ("lang", "speaker") if name in stored}
        assert index.language(utterance_id) == example.fields.get("lang")
    assert any("lang" in asked.reader.example(utterance_id).fields for utterance_id in range(4))


def test_targets_of_a_test_set_are_those_of_training_and_references_stay(shard_folder, prompts):
    config = ShardsToTest(shards=str(shard_folder))
    steps = ("lower_case", "no_punctuation")
    asked = build_test_set("held_out", config, EvaluationConfig(), prompts, steps, Storage())[0]
    examples = [asked.reader.example(utterance_id) for utterance_id in range(len(asked.index))]
    targets = {example.reference: prompts.transcript(example.completion[:-1]).text for example in examples}
    assert targets["Übermorgen fährt der Zug früher 1"] == "übermorgen fährt der zug früher 1"


def test_a_reference_of_which_no_target_is_left_counts_in_a_test_set(tmp_path, prompts):
    soundfile.write(tmp_path / "a.wav", tone(0.5), 16_000)
    manifest = write_lines(tmp_path / "manifest.jsonl", [{"audio_filepath": "a.wav", "text": "?!", "lang": "en"}])
    pack_manifest(manifest, tmp_path / "set", 10**9, skip_bad=False)
    config = ShardsToTest(shards=str(tmp_path / "set"))
    asked = build_test_set("marks", config, EvaluationConfig(), prompts, ("no_punctuation",), Storage())[0]
    example = asked.reader.example(0)
    assert (example.reference, example.completion) == ("?!", (prompts.eos_id,))


@pytest.fixture(scope="module")
def held_out(shard_folder, prompts):
    config = ShardsToTest(shards=str(shard_folder), max_utterances=7)
    return build_test_set("held_out", config, EvaluationConfig(batch_size=3), prompts, (), Storage())[0]


def test_batches_hold_every_utterance_once_longest_first(held_out):
    batches = held_out.batches
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert sorted(utterance_id for batch in batches for utterance_id in batch) == list(range(7))
    windows = [
        [-(-held_out.index.duration_seconds[utterance_id] // 1.28) for utterance_id in batch] for batch in batches
    ]
    assert all(max(later) <= min(earlier) for earlier, later in pairwise(windows))


def test_a_whole_test_set_comes_back_in_the_order_of_the_index(held_out):
    shuffled = [scored(utterance_id) for utterance_id in (4, 0, 6, 2, 1, 5, 3)]
    assert [utterance.decoded.utterance_id for utterance in check_complete(held_out, shuffled)] == list(range(7))


@pytest.mark.parametrize(
    ("utterance_ids", "sentence"),
    [
        ([0, 1, 2, 3, 4, 5], r"lost 1 utterances \(first: \[6\]\)"),
        ([], "lost 7 utterances"),
        ([0, 1, 2, 3, 4, 5, 6, 6], r"decoded 1 twice \(first: \[6\]\)"),
        ([0, 1, 2, 3, 4, 5, 5], r"lost 1 utterances"),
        ([0, 1, 2, 3, 4, 5, 6, 7], "held_out"),
        ([-1, 0, 1, 2, 3, 4, 5, 6], "held_out"),
    ],
)
def test_other_ids_than_those_of_the_index_give_no_rate(held_out, utterance_ids, sentence):
    with pytest.raises(RankError, match=sentence):
        check_complete(held_out, [scored(utterance_id) for utterance_id in utterance_ids])


def test_what_is_written_is_read_back(utterances, tmp_path):
    words = WordList(["three"])
    listed = [score_utterance(decoded(9, "a three", "a tree"), BASIC, words), *utterances]
    score = score_test_set(listed, BASIC, 5, Grouping(("speaker",)), Measurements(2.0, 0.5))
    write_results(tmp_path, "speech", listed, score)
    assert read_result(tmp_path / "speech.json") == score
    assert read_scored(tmp_path / "speech.jsonl") == listed
