"""Error counts equal jiwer's; no utterance is dropped, and the only division comes last."""

import random
from collections import Counter

import jiwer
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxtral_dist.scoring import word_errors
from voxtral_dist.scoring.alignment import align_words
from voxtral_dist.scoring.normalizer import normalizer
from voxtral_dist.scoring.word_errors import ErrorCounts, count_character_errors, count_punctuation_errors
from voxtral_dist.text.word_list import WordList

WORDS = ("one", "two", "three", "für", "हाथ", "l'été", "a")


def count_word_errors(reference: str, hypothesis: str) -> ErrorCounts:
    return word_errors.count_word_errors(align_words(reference, hypothesis))


def count_biased_errors(reference: str, hypothesis: str, listed: WordList) -> ErrorCounts:
    return word_errors.count_biased_errors(align_words(reference, hypothesis), listed)


def random_texts(num_texts: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(num_texts)]


@pytest.mark.parametrize("seed", range(5))
def test_sums_of_counts_equal_jiwers_of_the_whole_lists(seed):
    references, hypotheses = random_texts(60, seed), random_texts(60, seed + 100)
    # Mostly right, like a recognizer.
    hypotheses = [
        reference if i % 3 else hypothesis
        for i, (reference, hypothesis) in enumerate(zip(references, hypotheses, strict=True))
    ]
    words = sum(map(count_word_errors, references, hypotheses), ErrorCounts())
    expected = jiwer.process_words(references, hypotheses)
    assert (words.substitutions, words.deletions, words.insertions) == (
        expected.substitutions,
        expected.deletions,
        expected.insertions,
    )
    assert words.reference_length == expected.hits + expected.substitutions + expected.deletions
    assert words.rate == expected.wer
    assert words.match_error_rate == pytest.approx(expected.mer)
    assert words.information_lost == pytest.approx(expected.wil)

    characters = sum(map(count_character_errors, references, hypotheses), ErrorCounts())
    expected = jiwer.process_characters(references, hypotheses)
    assert (characters.substitutions, characters.deletions, characters.insertions) == (
        expected.substitutions,
        expected.deletions,
        expected.insertions,
    )
    assert characters.rate == expected.cer


TEXTS = st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join)
PAIRS = st.lists(st.tuples(TEXTS.filter(bool), TEXTS), min_size=1, max_size=12)


@given(PAIRS)
def test_sums_over_any_set_equal_jiwers_of_the_whole_lists(pairs):
    references, hypotheses = map(list, zip(*pairs, strict=True))
    words = sum((count_word_errors(*pair) for pair in pairs), ErrorCounts())
    characters = sum((count_character_errors(*pair) for pair in pairs), ErrorCounts())
    for counted, expected in (
        (words, jiwer.process_words(references, hypotheses)),
        (characters, jiwer.process_characters(references, hypotheses)),
    ):
        assert (counted.substitutions, counted.deletions, counted.insertions) == (
            expected.substitutions,
            expected.deletions,
            expected.insertions,
        )
        assert counted.reference_length == expected.hits + expected.substitutions + expected.deletions


@given(TEXTS, TEXTS)
def test_the_number_of_errors_is_a_distance(reference, hypothesis):
    there, back = count_word_errors(reference, hypothesis), count_word_errors(hypothesis, reference)
    assert there.errors == back.errors
    assert (there.errors == 0) == (reference == hypothesis)
    lengths = len(reference.split()), len(hypothesis.split())
    assert abs(lengths[0] - lengths[1]) <= there.errors <= max(lengths)
    assert there.deletions - there.insertions == lengths[0] - lengths[1]
    assert there.reference_length == lengths[0]


@pytest.mark.parametrize(
    ("reference", "hypothesis", "counts"),
    [
        ("a b c", "a b c", ErrorCounts(0, 0, 0, 3)),
        ("a b c", "", ErrorCounts(0, 3, 0, 3)),
        ("a b c", "  ", ErrorCounts(0, 3, 0, 3)),
        ("", "a b", ErrorCounts(0, 0, 2, 0)),
        ("", "", ErrorCounts()),
        ("a b c", "a x c", ErrorCounts(1, 0, 0, 3)),
        ("a b c", "a c", ErrorCounts(0, 1, 0, 3)),
        ("a b", "a x b", ErrorCounts(0, 0, 1, 2)),
        ("a  b", " a b ", ErrorCounts(0, 0, 0, 2)),
    ],
)
def test_word_errors(reference, hypothesis, counts):
    assert count_word_errors(reference, hypothesis) == counts


@pytest.mark.parametrize(
    ("reference", "hypothesis", "counts"),
    [
        ("ab c", "ab c", ErrorCounts(0, 0, 0, 4)),
        ("ab c", "", ErrorCounts(0, 4, 0, 4)),
        ("", "ab", ErrorCounts(0, 0, 2, 0)),
        ("ab c", "abc", ErrorCounts(0, 1, 0, 4)),
        ("ab", "axb", ErrorCounts(0, 0, 1, 2)),
        ("ab", "ax", ErrorCounts(1, 0, 0, 2)),
    ],
)
def test_character_errors(reference, hypothesis, counts):
    assert count_character_errors(reference, hypothesis) == counts


def test_an_empty_hypothesis_is_not_dropped_from_the_rate():
    pairs = [("a b c d", ""), ("a", "a")]
    assert sum((count_word_errors(*pair) for pair in pairs), ErrorCounts()).rate == 4 / 5


def test_errors_are_summed_then_divided():
    """Not a mean of rates, which would be (0 + 1) / 2."""
    pairs = [("a b c d e f g h i", "a b c d e f g h i"), ("a", "b")]
    assert sum((count_word_errors(*pair) for pair in pairs), ErrorCounts()).rate == 1 / 10


def test_insertions_into_an_empty_reference_count_in_the_sum():
    pairs = [("", "a b"), ("a b c d", "a b c d")]
    assert sum((count_word_errors(*pair) for pair in pairs), ErrorCounts()).rate == 2 / 4


def test_a_rate_without_reference_words_is_none():
    assert ErrorCounts().rate is None
    assert count_word_errors("", "a").rate is None


def test_a_rate_may_exceed_one():
    assert count_word_errors("a", "b c d").rate == 3.0


def test_the_errors_of_a_set_are_counted_after_the_normalizer():
    references, hypotheses = ["Hello, world!", "good night", "..."], ["hello word", "good night", "uh"]
    assert word_errors.word_errors(references, hypotheses) == ErrorCounts(1, 0, 1, 4)
    assert word_errors.word_errors(references, hypotheses, normalizer("none")) == ErrorCounts(3, 0, 0, 5)
    with pytest.raises(ValueError, match="shorter"):
        word_errors.word_errors(references, hypotheses[:1])
    with pytest.raises(TypeError, match="must be lists of texts"):
        word_errors.word_errors(references, hypotheses[0])


# Listed words: B-WER and U-WER.


@pytest.mark.parametrize(
    ("reference", "hypothesis", "biased", "unbiased"),
    [
        ("call siobhan now", "call siobhan now", ErrorCounts(0, 0, 0, 1), ErrorCounts(0, 0, 0, 2)),
        ("call siobhan now", "call chevon now", ErrorCounts(1, 0, 0, 1), ErrorCounts(0, 0, 0, 2)),
        ("call siobhan now", "call now", ErrorCounts(0, 1, 0, 1), ErrorCounts(0, 0, 0, 2)),
        ("call siobhan now", "please call siobhan", ErrorCounts(0, 0, 0, 1), ErrorCounts(0, 1, 1, 2)),
        # An insertion counts as biased only if the reference has the listed word.
        ("call siobhan now", "call siobhan siobhan now", ErrorCounts(0, 0, 1, 1), ErrorCounts(0, 0, 0, 2)),
        ("call now", "call siobhan now", ErrorCounts(), ErrorCounts(0, 0, 1, 2)),
        # Phrases count word by word; a part of a phrase is not an entry.
        ("to saint petersburg", "to saint peters", ErrorCounts(1, 0, 0, 2), ErrorCounts(0, 0, 0, 1)),
        ("a saint", "a saint", ErrorCounts(), ErrorCounts(0, 0, 0, 2)),
        ("siobhan", "", ErrorCounts(0, 1, 0, 1), ErrorCounts()),
        ("", "siobhan", ErrorCounts(), ErrorCounts(0, 0, 1, 0)),
        ("", "", ErrorCounts(), ErrorCounts()),
        # Without a normalizer, case and punctuation are edits, but do not change which words are listed.
        ("Call Siobhan, now", "Call siobhan, now", ErrorCounts(1, 0, 0, 1), ErrorCounts(0, 0, 0, 2)),
    ],
)
def test_edits_of_listed_words_and_of_all_others(reference, hypothesis, biased, unbiased):
    listed = WordList(["Siobhan", "Saint Petersburg", "Zürich"])
    counted = count_biased_errors(reference, hypothesis, listed)
    assert counted == biased
    assert count_word_errors(reference, hypothesis) - counted == unbiased


def test_the_rates_are_those_of_the_published_definition():
    """Compares with the scoring script of Le et al. (arXiv 2104.02194), which lists single words only."""
    rng = np.random.default_rng(0)
    vocabulary = [f"w{number}" for number in range(12)]
    listed = WordList(vocabulary[:5])
    for _ in range(200):
        reference = rng.choice(vocabulary, rng.integers(1, 9)).tolist()
        hypothesis = rng.choice(vocabulary, rng.integers(1, 9)).tolist()
        rare = set(reference) & set(vocabulary[:5])
        aligned = jiwer.process_words(" ".join(reference), " ".join(hypothesis)).alignments[0]
        edits = Counter()
        for chunk in aligned:
            words = hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx]
            if chunk.type != "insert":
                words = reference[chunk.ref_start_idx : chunk.ref_end_idx]
            edits[chunk.type] += sum(word in rare for word in words)
        expected = ErrorCounts(
            edits["substitute"], edits["delete"], edits["insert"], sum(word in rare for word in reference)
        )
        assert count_biased_errors(" ".join(reference), " ".join(hypothesis), listed) == expected


def test_spaces_are_no_characters_of_languages_without_them():
    assert count_character_errors("而 对", "而对", has_spaces=False) == ErrorCounts(reference_length=2)
    assert count_character_errors("而 对", "而对") == ErrorCounts(deletions=1, reference_length=3)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("Yes, no.", "yes, no.", ErrorCounts(reference_length=2)),
        ("Yes, no.", "yes no", ErrorCounts(deletions=2, reference_length=2)),
        ("Yes no", "yes, no?", ErrorCounts(insertions=2)),
        ("Yes. No", "yes! no", ErrorCounts(substitutions=1, reference_length=1)),
        ("it's 3.5, well-known", "it's 3.5, well-known", ErrorCounts(reference_length=1)),
        ("你好，世界。", "你好世界。", ErrorCounts(deletions=1, reference_length=2)),
        ("nothing", "at all", ErrorCounts()),
        ("", "...", ErrorCounts(insertions=3)),
    ],
)
def test_punctuation_marks_are_counted_apart_from_words(reference, hypothesis, expected):
    assert count_punctuation_errors(reference, hypothesis) == expected


def test_rates_of_empty_texts_are_none():
    assert ErrorCounts().match_error_rate is None
    assert ErrorCounts(insertions=2).information_lost is None
    assert ErrorCounts(insertions=2).match_error_rate == 1.0
