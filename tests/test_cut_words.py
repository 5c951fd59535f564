"""Utterances are cut into words where there are pauses, and sentences are made of the pieces."""

import random

import numpy as np
import pytest
from cut_words import SAMPLING_RATE, Piece, cut_in_pauses, made_sentences, syllables


def spoken(*seconds: float) -> np.ndarray:
    """Noise and quiet in turns, beginning with noise; of so many seconds each."""
    draw = np.random.default_rng(0)
    levels = (0.2, 0.0005)
    parts = [levels[place % 2] * draw.standard_normal(int(SAMPLING_RATE * one)) for place, one in enumerate(seconds)]
    return np.concatenate(parts).astype(np.float32)


def test_words_with_pauses_between_them_are_cut_apart():
    pieces = list(cut_in_pauses(spoken(0.3, 0.2, 0.4, 0.3, 0.3), ["G", "FIVE", "TWO"]))
    assert [piece.words for piece in pieces] == [("G",), ("FIVE",), ("TWO",)]
    # With at most 60 ms of the pauses at either end.
    assert [piece.seconds for piece in pieces] == pytest.approx([0.36, 0.52, 0.36], abs=0.05)


def test_words_without_a_pause_stay_together():
    pieces = list(cut_in_pauses(spoken(0.6, 0.2, 0.3), ["SIXTY", "ONE", "B"]))
    assert [word for piece in pieces for word in piece.words] == ["SIXTY", "ONE", "B"]
    assert pieces[-1].words == ("B",)


def test_what_cannot_be_so_short_or_so_long_is_left_out():
    assert list(cut_in_pauses(spoken(2.0), ["G"])) == []
    assert list(cut_in_pauses(spoken(0.3), list("PITTSBURGH"))) == []


def test_made_sentences_say_what_their_pieces_say():
    pieces = {
        "anna": [Piece((str(number),), spoken(0.3)) for number in range(5)],
        "bert": [Piece(("x", "y"), spoken(0.5))],
    }
    sentences = list(made_sentences(pieces, random.Random(0), 40))
    assert {sentence.speaker for sentence in sentences} == {"anna", "bert"}
    for sentence in sentences:
        known = {word for piece in pieces[sentence.speaker] for word in piece.words}
        assert set(sentence.words) <= known
        # A word of these pieces lasts 0.25 to 0.3 s, less what is cut of its end, and a little faster or slower.
        assert 0.15 < len(sentence.waveform) / SAMPLING_RATE / len(sentence.words) < 0.4
    assert len({sentence.words for sentence in sentences}) > 10


@pytest.mark.parametrize(("word", "count"), [("B", 1), ("W", 3), ("NINE", 1), ("SEVEN", 2), ("SEPTEMBER", 3)])
def test_syllables(word, count):
    assert syllables(word) == count
