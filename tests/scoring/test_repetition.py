"""Which texts count as repetition loops."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxtral_dist.scoring.repetition import has_repetition_loop


@pytest.mark.parametrize(
    ("hypothesis", "is_loop"),
    [
        ("no " * 8, True),
        ("no " * 7, False),
        ("so he said no " + "no " * 7 + "and left", True),
        ("thank you " * 4, True),
        ("Thank you. thank you, THANK YOU! Thank-you", True),
        ("thank you " * 3, False),
        ("a b c d e f " * 4, True),
        ("a b c d e f g " * 4, False),
        # Cut by the token limit in the middle of a repetition.
        ("one two three " * 4 + "one two", True),
        ("one two three " * 3 + "one two", False),
        # Repeated often, but not in a row.
        ("the cat the dog the cow the hen the pig the fox", False),
        ("", False),
    ],
)
def test_a_loop_is_four_times_in_a_row_over_eight_words(hypothesis, is_loop):
    assert has_repetition_loop(hypothesis, "a quiet day") == is_loop


def test_what_was_said_in_a_loop_is_none():
    assert not has_repetition_loop("row " * 12, "row " * 10)
    assert has_repetition_loop("row " * 12, "row " * 3)


@given(st.lists(st.sampled_from("abcd"), max_size=40))
def test_loops_are_those_of_the_definition(words):
    """Compares with a slow check of every place and length."""
    defined = any(
        words[start : start + length] * 4 == words[start : start + 4 * length]
        for length in range(2, 7)
        for start in range(len(words) - 4 * length + 1)
    ) or any(len(set(words[start : start + 8])) == 1 for start in range(len(words) - 7))
    assert has_repetition_loop(" ".join(words), "") == defined
