"""The utterances that a report shows: which ones, and each as a card with its words side by side."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TypeVar

from voxtral_dist.reporting.embedded_audio import EmbeddedAudio, MissingAudio
from voxtral_dist.scoring.alignment import AlignedWord, align_words
from voxtral_dist.scoring.comparison import Pair
from voxtral_dist.scoring.grouping import Grouping
from voxtral_dist.scoring.normalizer import Normalizer
from voxtral_dist.scoring.utterances import ScoredUtterance

# A hypothesis that loops may have thousands of words, and a language without spaces has words of any length.
MAX_WORDS = 120
MAX_CHARACTERS = 800
_MAX_WORD_CHARACTERS = 300

Numbered = tuple[int, ScoredUtterance]
T = TypeVar("T")


@dataclass(frozen=True)
class SideBySide:
    """The aligned words of a normalized reference and hypothesis, and how many more there are."""

    words: tuple[AlignedWord, ...]
    num_skipped: int


@dataclass(frozen=True)
class Card:
    """One shown utterance.

    number: of its line in `NAME.jsonl`, from 1. before: the words of the baseline's hypothesis. more_errors: than it.
    is_repeated: whether an earlier card has its audio.
    """

    number: int
    utterance: ScoredUtterance
    speaker: str | None
    aligned: SideBySide
    before: SideBySide | None = None
    more_errors: int | None = None
    audio: EmbeddedAudio | MissingAudio | None = None
    is_repeated: bool = False

    @property
    def clip(self) -> EmbeddedAudio | None:
        """The audio of the utterance."""
        return self.audio if isinstance(self.audio, EmbeddedAudio) else None

    @property
    def reason_for_silence(self) -> str | None:
        """Why it has none, where it was tried."""
        return self.audio.reason if isinstance(self.audio, MissingAudio) else None

    @property
    def flags(self) -> list[str]:
        """What went wrong as a whole."""
        one = self.utterance
        found = {
            "empty hypothesis": not one.decoded.hypothesis.strip(),
            "token limit": one.decoded.hit_limit,
            "repetition loop": one.has_repetition_loop,
        }
        return [name for name, is_so in found.items() if is_so]


def side_by_side(utterance: ScoredUtterance, used: Normalizer) -> SideBySide:
    """The normalized words of an utterance, shortened where they would fill pages."""
    aligned = align_words(used.apply(utterance.decoded.reference), used.apply(utterance.decoded.hypothesis))
    shown = tuple(AlignedWord(one.kind, _word(one.reference), _word(one.hypothesis)) for one in aligned[:MAX_WORDS])
    return SideBySide(shown, len(aligned) - len(shown))


def shortened(text: str, num_characters: int = MAX_CHARACTERS) -> str:
    """The text, or its beginning and how much is left out."""
    if len(text) <= num_characters:
        return text
    return f"{text[:num_characters]}… ({len(text) - num_characters} more characters)"


def with_most_errors(utterances: Sequence[ScoredUtterance], num_shown: int) -> list[Numbered]:
    """Those with the most word errors, the worst first; none without an error."""
    wrong = (numbered for numbered in enumerate(utterances, 1) if numbered[1].words.errors)
    return heapq.nsmallest(num_shown, wrong, key=lambda one: (-one[1].words.errors, one[0]))


def with_highest_rates(utterances: Sequence[ScoredUtterance], num_shown: int) -> list[Numbered]:
    """Those with the highest WER, the worst first, more errors before fewer; none whose reference has no words."""
    wrong = (one for one in enumerate(utterances, 1) if one[1].words.errors and one[1].words.rate is not None)
    return heapq.nsmallest(num_shown, wrong, key=lambda one: (-(one[1].words.rate or 0), -one[1].words.errors, one[0]))


def changed_most(pairs: Sequence[Pair], num_shown: int, sign: int) -> list[tuple[int, Pair]]:
    """Pairs whose second has the most fewer errors (sign -1) or more errors (sign 1), with their numbers from 1."""
    changed = (one for one in enumerate(pairs, 1) if sign * more_errors(one[1]) > 0)
    return heapq.nsmallest(num_shown, changed, key=lambda one: (-sign * more_errors(one[1]), one[0]))


def more_errors(pair: Pair) -> int:
    """Of the second run."""
    return pair[1].words.errors - pair[0].words.errors


def in_turns(lists: Iterable[Sequence[T]], identity: Callable[[T], int]) -> Iterator[T]:
    """The first of each list, then the second of each and so on, each once: so that every list has some."""
    seen: set[int] = set()
    for turn in zip_longest(*lists):
        for one in turn:
            if one is not None and identity(one) not in seen:
                seen.add(identity(one))
                yield one


def _word(word: str | None) -> str | None:
    return None if word is None else shortened(word, _MAX_WORD_CHARACTERS)


@dataclass(frozen=True)
class ChosenUtterances:
    """The utterances that a test set shows, by their numbers."""

    most_errors: list[Numbered]
    highest_rates: list[Numbered]
    better: list[tuple[int, Pair]]
    worse: list[tuple[int, Pair]]

    @classmethod
    def of(cls, utterances: Sequence[ScoredUtterance], pairs: Sequence[Pair], num_shown: int) -> ChosenUtterances:
        """At most so many of each kind; pairs are those of a baseline and this, and may be none."""
        return cls(
            with_most_errors(utterances, num_shown),
            with_highest_rates(utterances, num_shown),
            changed_most(pairs, num_shown, -1),
            changed_most(pairs, num_shown, 1),
        )

    def in_turns(self) -> list[Numbered]:
        """All of them in the order in which they get audio: so that every kind has some."""
        better, worse = ([(number, pair[1]) for number, pair in pairs] for pairs in (self.better, self.worse))
        return list(in_turns([self.most_errors, self.highest_rates, worse, better], lambda one: one[0]))


class CardMaker:
    """Makes cards in the order in which they stand, of which the first of an utterance has its audio."""

    def __init__(self, used: Normalizer, grouping: Grouping, clips: Mapping[int, EmbeddedAudio | MissingAudio]) -> None:
        self._used = used
        self._grouping = grouping
        self._clips = clips
        self._seen: set[int] = set()

    def plain(self, numbered: Sequence[Numbered]) -> tuple[Card, ...]:
        """A card for each utterance."""
        return tuple(self._card(number, utterance) for number, utterance in numbered)

    def changed(self, numbered: Sequence[tuple[int, Pair]]) -> tuple[Card, ...]:
        """Cards with the words of the baseline."""
        return tuple(
            replace(
                self._card(number, pair[1]), before=side_by_side(pair[0], self._used), more_errors=more_errors(pair)
            )
            for number, pair in numbered
        )

    def _card(self, number: int, utterance: ScoredUtterance) -> Card:
        is_repeated = number in self._seen
        self._seen.add(number)
        speaker = self._grouping.speaker(utterance.decoded)
        aligned = side_by_side(utterance, self._used)
        return Card(number, utterance, speaker, aligned, audio=self._clips.get(number), is_repeated=is_repeated)
