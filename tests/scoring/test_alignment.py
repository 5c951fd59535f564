"""Alignments hold every word of both texts; confusions count their edits."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxtral_dist.scoring.alignment import AlignedWord, Confusion, align_words, most_frequent_confusions
from voxtral_dist.scoring.word_errors import ErrorCounts, count_word_errors

TEXTS = st.text(alphabet="ab c\u00e9\u00a0\t", max_size=30)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "kinds"),
    [
        ("a b c", "a x c", ("equal", "substitute", "equal")),
        ("a b c", "a c", ("equal", "delete", "equal")),
        ("a c", "a b c", ("equal", "insert", "equal")),
        ("a b", "", ("delete", "delete")),
        ("", "a b", ("insert", "insert")),
        ("", " ", ()),
    ],
)
def test_each_word_has_its_kind(reference, hypothesis, kinds):
    assert tuple(word.kind for word in align_words(reference, hypothesis)) == kinds


@given(TEXTS, TEXTS)
def test_an_alignment_holds_both_texts_in_their_order(reference, hypothesis):
    alignment = align_words(reference, hypothesis)
    assert [word.reference for word in alignment if word.reference is not None] == reference.split()
    assert [word.hypothesis for word in alignment if word.hypothesis is not None] == hypothesis.split()
    for word in alignment:
        assert (word.kind == "equal") == (word.reference == word.hypothesis)
        assert (word.kind == "insert") == (word.reference is None)
        assert (word.kind == "delete") == (word.hypothesis is None)


def test_the_most_frequent_confusions_come_first():
    pairs = [("we met Siobhan", "we met chevon"), ("Siobhan came in", "chevon came"), ("in town", "on town uh")]
    confusions = most_frequent_confusions(align_words(*pair) for pair in pairs)
    assert confusions == {
        "substitute": [Confusion("substitute", "Siobhan", "chevon", 2), Confusion("substitute", "in", "on", 1)],
        "delete": [Confusion("delete", "in", None, 1)],
        "insert": [Confusion("insert", None, "uh", 1)],
    }
    assert most_frequent_confusions([align_words("b a", "")], num_each=1)["delete"] == [
        Confusion("delete", "a", None, 1)
    ]


@given(st.lists(st.tuples(TEXTS, TEXTS), max_size=6))
def test_confusions_add_up_to_the_counts(pairs):
    alignments = [align_words(*pair) for pair in pairs]
    counts = sum(map(count_word_errors, alignments), ErrorCounts())
    found = most_frequent_confusions(alignments, num_each=1000)
    sums = Counter({kind: sum(one.count for one in confusions) for kind, confusions in found.items()})
    assert (sums["substitute"], sums["delete"], sums["insert"]) == (
        counts.substitutions,
        counts.deletions,
        counts.insertions,
    )
    assert AlignedWord("equal", "a", "a") not in found["substitute"]
