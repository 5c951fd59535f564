"""Edits are integers that equal jiwer's; nothing is dropped, and the only division comes last."""

import random
from collections import Counter

import jiwer
import numpy as np
import pytest

from voxtral_dist.data.context import WordList
from voxtral_dist.evaluation.word_errors import (
    ErrorCounts,
    bootstrap_interval,
    count_biased_errors,
    count_character_errors,
    count_word_errors,
)

WORDS = ("one", "two", "three", "für", "हाथ", "l'été", "a")


def random_texts(num_texts: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(num_texts)]


@pytest.mark.parametrize("seed", range(5))
def test_sums_of_counts_equal_jiwers_of_the_whole_lists(seed):
    references, hypotheses = random_texts(60, seed), random_texts(60, seed + 100)
    # What a recognizer does: mostly right.
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

    characters = sum(map(count_character_errors, references, hypotheses), ErrorCounts())
    expected = jiwer.process_characters(references, hypotheses)
    assert (characters.substitutions, characters.deletions, characters.insertions) == (
        expected.substitutions,
        expected.deletions,
        expected.insertions,
    )
    assert characters.rate == expected.cer


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


def test_a_rate_of_nothing_is_none():
    assert ErrorCounts().rate is None
    assert count_word_errors("", "a").rate is None


def test_a_rate_may_exceed_one():
    assert count_word_errors("a", "b c d").rate == 3.0


def counts_of(seed: int, num_texts: int = 200) -> list[ErrorCounts]:
    references, hypotheses = random_texts(num_texts, seed), random_texts(num_texts, seed + 50)
    return list(map(count_word_errors, references, hypotheses))


@pytest.mark.parametrize("seed", range(3))
def test_the_bootstrap_interval_holds_the_rate_and_is_the_same_every_time(seed):
    counts = counts_of(seed)
    rate = sum(counts, ErrorCounts()).rate
    low, high = bootstrap_interval(counts)
    assert low < rate < high
    assert (low, high) == bootstrap_interval(counts)
    assert (low, high) != bootstrap_interval(counts, seed=1)


def test_more_utterances_give_a_narrower_interval():
    few, many = (bootstrap_interval(counts_of(0, num_texts)) for num_texts in (30, 600))
    assert many[1] - many[0] < (few[1] - few[0]) / 2


def test_the_interval_of_equal_utterances_is_their_rate():
    assert bootstrap_interval([ErrorCounts(1, 0, 0, 4)] * 10) == (0.25, 0.25)


def test_there_is_no_interval_of_nothing():
    assert bootstrap_interval([]) is None
    assert bootstrap_interval([ErrorCounts(0, 0, 3, 0)]) is None


# Words of a list: B-WER and U-WER.


@pytest.mark.parametrize(
    ("reference", "hypothesis", "biased", "unbiased"),
    [
        ("call siobhan now", "call siobhan now", ErrorCounts(0, 0, 0, 1), ErrorCounts(0, 0, 0, 2)),
        ("call siobhan now", "call chevon now", ErrorCounts(1, 0, 0, 1), ErrorCounts(0, 0, 0, 2)),
        ("call siobhan now", "call now", ErrorCounts(0, 1, 0, 1), ErrorCounts(0, 0, 0, 2)),
        ("call siobhan now", "please call siobhan", ErrorCounts(0, 0, 0, 1), ErrorCounts(0, 1, 1, 2)),
        # An insertion counts where the reference has the word: a list says nothing about other utterances.
        ("call siobhan now", "call siobhan siobhan now", ErrorCounts(0, 0, 1, 1), ErrorCounts(0, 0, 0, 2)),
        ("call now", "call siobhan now", ErrorCounts(), ErrorCounts(0, 0, 1, 2)),
        # Phrases count word by word, and parts of them are no entries.
        ("to saint petersburg", "to saint peters", ErrorCounts(1, 0, 0, 2), ErrorCounts(0, 0, 0, 1)),
        ("a saint", "a saint", ErrorCounts(), ErrorCounts(0, 0, 0, 2)),
        ("siobhan", "", ErrorCounts(0, 1, 0, 1), ErrorCounts()),
        ("", "siobhan", ErrorCounts(), ErrorCounts(0, 0, 1, 0)),
        ("", "", ErrorCounts(), ErrorCounts()),
        # As without a normalizer: case and punctuation are edits, but change nothing about what is listed.
        ("Call Siobhan, now", "Call siobhan, now", ErrorCounts(1, 0, 0, 1), ErrorCounts(0, 0, 0, 2)),
    ],
)
def test_edits_of_listed_words_and_of_all_others(reference, hypothesis, biased, unbiased):
    listed = WordList(["Siobhan", "Saint Petersburg", "Zürich"])
    counted = count_biased_errors(reference, hypothesis, listed)
    assert counted == biased
    assert count_word_errors(reference, hypothesis) - counted == unbiased


def test_the_rates_are_those_of_the_published_definition():
    """Each word alone decides, as in the scoring script of Le et al. (arXiv 2104.02194), which knows single words."""
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
