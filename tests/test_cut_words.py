"""Utterances are cut into their words, wherever those are, and sentences are made of the pieces."""

import random
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import pytest

import cut_words
from alignment import FRAME, SAMPLING_RATE, Utterance, Word, align, syllables
from cut_words import Aligned, copies, made_sentences, short_pieces

# Two tones for each word, in Hz, and how long it lasts, in frames of 10 ms.
SOUNDS = {"B": (300, 900, 24), "OH": (1800, 500, 30), "SIX": (3200, 1300, 36), "TWO": (700, 2400, 28)}


def spoken(words: Sequence[str], pauses: Sequence[int], draw: np.random.Generator, loudness: float) -> Aligned:
    """Words at known places, with so many frames of faint noise before each and behind the last."""
    parts, placed, frame = [], [], 0
    for number, pause in enumerate(pauses):
        parts.append(0.001 * draw.standard_normal(pause * FRAME))
        frame += pause
        if number == len(words):
            break
        first, second, usual = SOUNDS[words[number]]
        length = usual + int(draw.integers(-4, 5))
        time = np.arange(length * FRAME) / SAMPLING_RATE
        tone = np.where(time < time[-1] / 2, np.sin(2 * np.pi * first * time), np.sin(2 * np.pi * second * time))
        parts.append(loudness * tone + 0.01 * draw.standard_normal(len(tone)))
        placed.append(Word(words[number], frame, frame + length))
        frame += length
    waveform = np.concatenate(parts).astype(np.float32)
    return Aligned(Utterance("anna" if loudness > 0.2 else "bert", tuple(words), waveform), placed)


@pytest.fixture(scope="module")
def corpus() -> list[Aligned]:
    """40 utterances by two speakers, half of their words without a pause before them."""
    draw = np.random.default_rng(0)
    made = []
    for number in range(40):
        words = draw.choice(list(SOUNDS), size=int(draw.integers(1, 6))).tolist()
        inner = [int(draw.integers(10, 30)) if draw.random() < 0.5 else 0 for _ in words[1:]]
        made.append(spoken(words, [15, *inner, 20], draw, 0.3 if number % 2 else 0.1))
    return made


def test_words_are_found_where_they_are_with_and_without_pauses_between_them(corpus):
    found = align([one.utterance for one in corpus])
    pairs = [pair for one, words in zip(corpus, found, strict=True) for pair in zip(one.words, words, strict=True)]
    assert [word.text for _, word in pairs] == [word.text for word, _ in pairs]
    assert max(abs(word.start - true.start) for true, word in pairs) <= 4
    assert max(abs(word.stop - true.stop) for true, word in pairs) <= 4


@pytest.mark.parametrize(("words", "seconds"), [(("SEVENTY",) * 20, 0.5), (("B",), 0.08)])
def test_an_utterance_that_is_too_short_for_its_words_is_named(words, seconds):
    noise = np.random.default_rng(0).random(int(seconds * SAMPLING_RATE), dtype=np.float32)
    with pytest.raises(SystemExit, match=f"{words[0]}.* of anna lasts {seconds:.2f} s"):
        align([Utterance("anna", words, noise)])


def test_a_piece_has_a_little_of_long_pauses_and_nothing_of_other_words():
    one = spoken(["B", "OH", "SIX"], [15, 0, 20, 20], np.random.default_rng(0), 0.3)
    first, second, third = one.words
    whole = one.utterance.waveform
    assert one.piece(0, 1).words == ("B",)
    assert len(one.piece(0, 1).waveform) == (first.stop - first.start + 6) * FRAME
    assert len(one.piece(1, 1).waveform) == (second.stop - second.start + 6) * FRAME
    assert len(one.piece(0, 3).waveform) == (third.stop - first.start + 12) * FRAME
    middle = slice(FRAME, -FRAME)
    assert np.array_equal(
        one.piece(1, 1).waveform[middle],
        whole[second.start * FRAME :][middle][: (second.stop - second.start + 4) * FRAME],
    )
    assert one.piece(1, 1).waveform[0] == one.piece(1, 1).waveform[-1] == 0


def test_short_pieces_come_equally_often_at_speeds_of_their_own(corpus):
    pieces = [piece for one in corpus for piece in one.pieces()]
    assert max(piece.seconds for piece in pieces) <= 1.3
    assert {len(piece.words) for piece in pieces} == {1, 2, 3}
    drawn = list(short_pieces(corpus, random.Random(0), 2 * len(pieces)))
    assert sorted(one.words for one in drawn) == sorted(2 * [piece.words for piece in pieces])
    ratio = sum(one.seconds for one in drawn) / sum(piece.seconds for piece in pieces) / 2
    assert 0.95 < ratio < 1.1
    assert len({len(one.waveform) for one in drawn}) > len(pieces)


def tones_of(waveform: np.ndarray) -> list[int]:
    """The loudest frequency of each frame in Hz, those in a row once; without quiet frames and the ones at edges."""
    frames = waveform[: len(waveform) // FRAME * FRAME].reshape(-1, FRAME)
    loudest = np.abs(np.fft.rfft(frames)).argmax(axis=1) * SAMPLING_RATE // FRAME
    loudest = loudest[np.abs(frames).max(axis=1) > 0.05]
    runs = [(tone, len(list(run))) for tone, run in groupby(loudest.tolist())]
    return [tone for tone, length in runs if length >= 5]


def test_made_sentences_say_their_words_in_order_in_one_voice(corpus, monkeypatch):
    monkeypatch.setattr(cut_words, "SPEEDS", (1.0, 1.0))
    sentences = list(made_sentences(corpus, random.Random(0), 200))
    known = {one.utterance.words for one in corpus}
    assert sum(sentence.words not in known for sentence in sentences) > 100
    loudness = {"anna": 0.3, "bert": 0.1}
    assert {sentence.speaker for sentence in sentences} == set(loudness)
    for sentence in sentences:
        assert tones_of(sentence.waveform) == [tone for word in sentence.words for tone in SOUNDS[word][:2]]
        assert np.abs(sentence.waveform).max() == pytest.approx(loudness[sentence.speaker], abs=0.06)


def test_an_utterance_comes_once_as_it_is_and_then_at_other_speeds(corpus):
    utterances = [one.utterance for one in corpus[:3]]
    made = list(copies(utterances, random.Random(0), 4))
    assert [one.words for one in made] == [utterance.words for utterance in utterances for _ in range(4)]
    for number, one in enumerate(made):
        original = utterances[number // 4].waveform
        assert np.array_equal(one.waveform, original) == (number % 4 == 0)
        assert 0.86 < len(one.waveform) / len(original) < 1.18


@pytest.mark.parametrize(("word", "count"), [("B", 1), ("W", 3), ("NINE", 1), ("SEVEN", 2), ("SEPTEMBER", 3)])
def test_syllables(word, count):
    assert syllables(word) == count
