"""The result of a test set sums integer counts, and what is written adds up and is read back."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from voxtral_dist.scoring.grouping import Grouping
from voxtral_dist.scoring.hypotheses import read_scored, scored_row
from voxtral_dist.scoring.normalizer import normalizer
from voxtral_dist.scoring.result_files import read_result, result_row, write_results
from voxtral_dist.scoring.results import (
    BiasedErrors,
    LanguageIdentification,
    Measurements,
    score_test_set,
)
from voxtral_dist.scoring.utterances import DecodedUtterance, ScoredUtterance, score_utterance
from voxtral_dist.scoring.word_errors import ErrorCounts
from voxtral_dist.text.word_list import WordList

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


def test_a_result_sums_counts_over_utterances_and_divides_once(utterances):
    result = score_test_set(utterances, BASIC)
    rates = result.normalized
    assert rates.words == ErrorCounts(substitutions=1, deletions=3, insertions=0, reference_length=8)
    assert rates.wer == 4 / 8
    assert rates.cer == rates.characters.errors / sum(len(BASIC.apply(reference)) for reference, *_ in PAIRS)
    assert rates.wer_interval[0] <= rates.wer <= rates.wer_interval[1]
    assert (rates.num_utterances, result.num_limit_hits, rates.audio_seconds) == (5, 1, 7.5)
    assert result.num_empty_hypotheses == 1
    assert {language: part.wer for language, part in result.slices["language"].items()} == {
        "de": 1.0,
        "en": 2 / 5,
        "unknown": 0.0,
    }
    assert result.normalizer == BASIC.label


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
    result = score_test_set(utterances, BASIC)
    assert (result.num_empty_references, result.normalized.words.insertions, result.normalized.wer) == (1, 2, 2 / 4)


def test_measurements_of_decoding_are_part_of_the_result(utterances):
    result = score_test_set(utterances, BASIC, measured=Measurements(decode_seconds=3.0, loss=0.5))
    assert (result.rtfx, result.measured.loss, result.measured.perplexity) == (7.5 / 3, 0.5, math.exp(0.5))
    assert {"rtfx": 2.5, "loss": 0.5}.items() <= result.metrics().items()
    unmeasured = score_test_set(utterances, BASIC)
    assert unmeasured.measured == Measurements(None, None)
    assert (unmeasured.rtfx, unmeasured.measured.perplexity) == (None, None)
    assert not {"rtfx", "loss", "perplexity"} & unmeasured.metrics().keys()


def test_hypotheses_that_got_stuck_are_counted():
    utterances = [scored(0, "so it goes", "So " + "it goes, " * 6), scored(1)]
    result = score_test_set(utterances, BASIC)
    assert [one.has_repetition_loop for one in utterances] == [True, False]
    assert result.num_repetition_loops == result.metrics()["num_repetition_loops"] == 1


def test_a_result_does_not_depend_on_the_order(utterances):
    one, other = score_test_set(utterances, BASIC), score_test_set(utterances[::-1], BASIC)
    assert (one.normalized.words, one.normalized.characters) == (other.normalized.words, other.normalized.characters)
    assert (one.normalized.wer, one.normalized.cer) == (other.normalized.wer, other.normalized.cer)
    rates = [
        {label: part.wer for part_of in result.slices.values() for label, part in part_of.items()}
        for result in (one, other)
    ]
    assert rates[0] == rates[1]


def detected(number: int, language: str | None, named: str | None, asked: bool = True) -> ScoredUtterance:
    one = scored(number, language=language)
    return replace(one, decoded=replace(one.decoded, detected_language=named, asks_for_language=asked))


def test_detected_languages_are_counted_where_the_prompt_omitted_a_known_language():
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
    result = score_test_set(utterances, BASIC, num_distractors=7)
    assert result.biased == BiasedErrors(7, ErrorCounts(1, 0, 0, 2), ErrorCounts(0, 1, 1, 4))
    assert (result.biased.biased_wer, result.biased.unbiased_wer) == (1 / 2, 2 / 4)
    assert result.normalized.wer == 3 / 6
    assert result.metrics()["biased_wer"] == 0.5
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


def test_results_on_disk_add_up_to_the_result(utterances, tmp_path):
    result = score_test_set(utterances, BASIC)
    write_results(tmp_path / "made" / "here", "name", utterances, result)
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


def test_what_is_written_is_read_back(utterances, tmp_path):
    words = WordList(["three"])
    listed = [score_utterance(decoded(9, "a three", "a tree"), BASIC, words), *utterances]
    result = score_test_set(listed, BASIC, 5, Grouping(("speaker",)), Measurements(2.0, 0.5))
    write_results(tmp_path, "speech", listed, result)
    assert read_result(tmp_path / "speech.json") == result
    assert read_scored(tmp_path / "speech.jsonl") == listed


def test_the_documentation_lists_the_keys_of_a_result(utterances):
    documented = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    row = result_row(score_test_set(utterances, BASIC))
    for keys in (row, row["orthographic"], row["slices"]["language"]["en"], row["words"], scored_row(utterances[0])):
        assert [key for key in keys if f"`{key}`" not in documented] == []
