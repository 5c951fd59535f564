"""Every utterance is in one slice of each field, and slices add up to the set."""

from __future__ import annotations

from dataclasses import replace

import pytest

from voxtral_dist.config import EvaluationConfig
from voxtral_dist.scoring.grouping import Grouping, field_label
from voxtral_dist.scoring.intervals import MIN_SPEAKERS
from voxtral_dist.scoring.normalizer import normalizer
from voxtral_dist.scoring.results import score_test_set
from voxtral_dist.scoring.slices import duration_range
from voxtral_dist.scoring.utterances import DecodedUtterance, ScoredUtterance, score_utterance
from voxtral_dist.scoring.word_errors import ErrorCounts

BASIC = normalizer("basic")


def scored(
    number: int, hypothesis: str, duration_seconds: float | None = 3.0, language: str | None = "en", **fields: object
) -> ScoredUtterance:
    utterance = DecodedUtterance(
        utterance_id=number,
        key=f"key-{number}",
        language=language,
        duration_seconds=duration_seconds,
        reference="a b c d",
        hypothesis=hypothesis,
        hit_limit=False,
        fields=fields,
    )
    return score_utterance(utterance, BASIC)


UTTERANCES = [
    scored(0, "a b c d", 3.0, "en", domain="news", speaker="x"),
    scored(1, "a b", 5.0, "de", domain="news", speaker="y"),
    scored(2, "", 65.0, None, domain=7, speaker="y"),
    scored(3, "a b c d e", 12.5, "de", speaker="z"),
]


@pytest.mark.parametrize(
    ("duration_seconds", "expected"),
    [
        (0.0, "<5 s"),
        (4.99, "<5 s"),
        (5.0, "5-10 s"),
        (10.0, "10-20 s"),
        (29.99, "20-30 s"),
        (30.0, "30-60 s"),
        (60.0, ">=60 s"),
        (1800.0, ">=60 s"),
        (None, "unknown"),
    ],
)
def test_the_range_of_a_duration(duration_seconds, expected):
    assert duration_range(duration_seconds) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [("news", "news"), (7, "7"), (True, "true"), (None, "unknown"), ("", "unknown"), (["ä", 1], '["ä", 1]')],
)
def test_any_value_of_json_names_a_slice(value, expected):
    assert field_label(value) == expected


def test_slices_have_counts_rates_and_sizes():
    slices = score_test_set(UTTERANCES, BASIC, grouping=Grouping(("domain",))).slices
    assert {name: list(parts) for name, parts in slices.items()} == {
        "language": ["de", "en", "unknown"],
        "duration": ["<5 s", "5-10 s", "10-20 s", ">=60 s"],
        "domain": ["7", "news", "unknown"],
    }
    news = slices["domain"]["news"]
    assert (news.num_utterances, news.audio_seconds) == (2, 8.0)
    assert news.words == ErrorCounts(deletions=2, reference_length=8)
    assert (news.wer, news.cer) == (2 / 8, 4 / 14)
    assert news.wer_interval == (0.0, 0.5)
    assert slices["domain"]["7"].wer_interval is None, "of one utterance"


def test_slices_add_up_to_the_set():
    result = score_test_set(UTTERANCES, BASIC, grouping=Grouping(("domain", "speaker", "nothing")))
    for parts in result.slices.values():
        assert sum((part.words for part in parts.values()), ErrorCounts()) == result.normalized.words
        assert sum((part.characters for part in parts.values()), ErrorCounts()) == result.normalized.characters
        assert sum(part.num_utterances for part in parts.values()) == result.normalized.num_utterances
        assert sum(part.audio_seconds for part in parts.values()) == result.normalized.audio_seconds
    assert list(result.slices["nothing"]) == ["unknown"]


def test_audio_of_unknown_length_has_no_sum():
    result = score_test_set([*UTTERANCES, scored(4, "a", None)], BASIC)
    assert result.normalized.audio_seconds is None
    assert result.slices["duration"]["unknown"].num_utterances == 1
    assert result.slices["duration"]["<5 s"].audio_seconds == 3.0


def test_each_slice_says_what_it_resamples():
    utterances = [
        scored(number, "a b", language="de" if number % 2 else "en", talker=f"speaker {number // 4}")
        for number in range(4 * MIN_SPEAKERS)
    ]
    result = score_test_set(utterances, BASIC, grouping=Grouping(("talker",), "talker"))
    assert result.normalized.resampled == result.orthographic.resampled == "speaker"
    assert result.slices["language"]["de"].resampled == "speaker"
    assert {part.resampled for part in result.slices["talker"].values()} == {"utterance"}
    assert score_test_set(utterances, BASIC).normalized.resampled == "utterance", "another field names the speaker"


def test_the_configuration_says_what_utterances_have_to_bring():
    grouping = Grouping.of(EvaluationConfig(slices=("domain", "talker"), speaker_field="talker"))
    assert grouping.fields == ("domain", "talker")
    assert Grouping.of(EvaluationConfig()).fields == ("speaker",)


def test_a_field_that_is_called_language_does_not_replace_the_languages():
    one = scored(0, "a b", language="en")
    utterance = replace(one, decoded=replace(one.decoded, fields={"language": "x"}))
    result = score_test_set([utterance], BASIC, grouping=Grouping(("language", "duration")))
    assert list(result.slices) == ["language", "duration"]
    assert list(result.slices["language"]) == ["en"]
