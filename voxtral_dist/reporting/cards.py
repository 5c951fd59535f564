"""The utterances that a report shows, each as a card with the words of reference and hypothesis side by side."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TypeVar

from voxtral_dist.config import ErrorRate
from voxtral_dist.output.counting import counted
from voxtral_dist.reporting.embedded_audio import EmbeddedAudio, MissingAudio
from voxtral_dist.scoring.alignment import AlignedWord, align_words
from voxtral_dist.scoring.comparison import Pair
from voxtral_dist.scoring.grouping import Grouping
from voxtral_dist.scoring.normalizer import Normalizer
from voxtral_dist.scoring.utterances import ScoredUtterance, normalized_pair
from voxtral_dist.scoring.word_errors import ErrorCounts

# A repetition loop may have thousands of words, and text without spaces has words of any length.
MAX_WORDS = 120
MAX_CHARACTERS = 800
_MAX_WORD_CHARACTERS = 300

Numbered = tuple[int, ScoredUtterance]
T = TypeVar("T")


@dataclass(frozen=True)
class SideBySide:
    """The aligned words of a normalized reference and hypothesis; `num_skipped` more are not shown."""

    words: tuple[AlignedWord, ...]
    num_skipped: int


@dataclass(frozen=True)
class Card:
    """One utterance.

    number: line in `NAME.jsonl`, from 1. counts: errors of its words or of its characters. before: words of the
    baseline's hypothesis. more_errors: than the baseline. is_repeated: whether an earlier card shows the same
    utterance.
    """

    number: int
    utterance: ScoredUtterance
    counts: ErrorCounts
    speaker: str | None
    aligned: SideBySide
    before: SideBySide | None = None
    more_errors: int | None = None
    audio: EmbeddedAudio | MissingAudio | None = None
    is_repeated: bool = False

    @property
    def clip(self) -> EmbeddedAudio | None:
        """The audio, if there is some."""
        return self.audio if isinstance(self.audio, EmbeddedAudio) else None

    @property
    def reason_for_silence(self) -> str | None:
        """Why there is no audio, if it was looked for."""
        return self.audio.reason if isinstance(self.audio, MissingAudio) else None

    @property
    def flags(self) -> list[str]:
        """What is wrong with the hypothesis as a whole."""
        one = self.utterance
        found = {
            "empty hypothesis": not one.decoded.hypothesis.strip(),
            "token limit": one.decoded.hit_limit,
            "repetition loop": one.has_repetition_loop,
        }
        return [name for name, is_so in found.items() if is_so]


def side_by_side(utterance: ScoredUtterance, normalizer: Normalizer) -> SideBySide:
    """The normalized words of an utterance, at most `MAX_WORDS`, long words shortened."""
    aligned = align_words(*normalized_pair(utterance.decoded, normalizer))
    shown = tuple(AlignedWord(one.kind, _word(one.reference), _word(one.hypothesis)) for one in aligned[:MAX_WORDS])
    return SideBySide(shown, len(aligned) - len(shown))


def shortened(text: str, num_characters: int = MAX_CHARACTERS) -> str:
    """The text, or its beginning and the number of the other characters."""
    if len(text) <= num_characters:
        return text
    return f"{text[:num_characters]}… ({counted(len(text) - num_characters, 'more character')})"


def with_most_errors(utterances: Sequence[ScoredUtterance], num_shown: int, metric: ErrorRate) -> list[Numbered]:
    """The utterances with the most errors, the worst first; none without an error."""
    found = [(number, one, one.counts(metric)) for number, one in enumerate(utterances, 1)]
    wrong = (one for one in found if one[2].errors)
    return [one[:2] for one in heapq.nsmallest(num_shown, wrong, key=lambda one: (-one[2].errors, one[0]))]


def with_highest_rates(utterances: Sequence[ScoredUtterance], num_shown: int, metric: ErrorRate) -> list[Numbered]:
    """The utterances with the highest rates, the worst first, ties by errors; none whose reference is empty."""
    found = [(number, one, one.counts(metric)) for number, one in enumerate(utterances, 1)]
    wrong = (one for one in found if one[2].errors and one[2].rate is not None)
    worst = heapq.nsmallest(num_shown, wrong, key=lambda one: (-(one[2].rate or 0), -one[2].errors, one[0]))
    return [one[:2] for one in worst]


def changed_most(pairs: Sequence[Pair], num_shown: int, sign: int, metric: ErrorRate) -> list[tuple[int, Pair]]:
    """The pairs whose errors fell most (sign -1) or rose most (sign 1) from baseline to run, numbered from 1."""
    changed = [(sign * more_errors(pair, metric), number, pair) for number, pair in enumerate(pairs, 1)]
    chosen = heapq.nsmallest(num_shown, (one for one in changed if one[0] > 0), key=lambda one: (-one[0], one[1]))
    return [one[1:] for one in chosen]


def more_errors(pair: Pair, metric: ErrorRate) -> int:
    """Errors of the run minus those of its baseline."""
    before, after = pair
    return after.counts(metric).errors - before.counts(metric).errors


def in_turns(lists: Iterable[Sequence[T]], identity: Callable[[T], int]) -> Iterator[T]:
    """The first of each list, then the second of each and so on, without duplicates, so that no list dominates."""
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
    """The utterances that the section of a test set shows, numbered from 1."""

    most_errors: list[Numbered]
    highest_rates: list[Numbered]
    better: list[tuple[int, Pair]]
    worse: list[tuple[int, Pair]]

    @classmethod
    def of(
        cls, utterances: Sequence[ScoredUtterance], pairs: Sequence[Pair], num_shown: int, metric: ErrorRate
    ) -> ChosenUtterances:
        """Choose at most `num_shown` of each kind, by words or by characters; `pairs` with a baseline may be empty."""
        return cls(
            with_most_errors(utterances, num_shown, metric),
            with_highest_rates(utterances, num_shown, metric),
            changed_most(pairs, num_shown, -1, metric),
            changed_most(pairs, num_shown, 1, metric),
        )

    def in_turns(self) -> list[Numbered]:
        """All utterances in the order in which they get audio, so that every kind has some."""
        better, worse = ([(number, pair[1]) for number, pair in pairs] for pairs in (self.better, self.worse))
        return list(in_turns([self.most_errors, self.highest_rates, worse, better], lambda one: one[0]))


class CardMaker:
    """Makes cards in the order of the page; the first card of an utterance has its audio."""

    def __init__(
        self,
        normalizer: Normalizer,
        grouping: Grouping,
        metric: ErrorRate,
        audio: Mapping[int, EmbeddedAudio | MissingAudio],
    ) -> None:
        self._normalizer = normalizer
        self._grouping = grouping
        self._metric: ErrorRate = metric
        self._audio = audio
        self._seen: set[int] = set()

    def plain(self, numbered: Sequence[Numbered]) -> tuple[Card, ...]:
        """One card for each utterance."""
        return tuple(self._card(number, utterance) for number, utterance in numbered)

    def changed(self, numbered: Sequence[tuple[int, Pair]]) -> tuple[Card, ...]:
        """Cards that also show the words of the baseline."""
        return tuple(
            replace(
                self._card(number, pair[1]),
                before=side_by_side(pair[0], self._normalizer),
                more_errors=more_errors(pair, self._metric),
            )
            for number, pair in numbered
        )

    def _card(self, number: int, utterance: ScoredUtterance) -> Card:
        is_repeated = number in self._seen
        self._seen.add(number)
        speaker = self._grouping.speaker(utterance.decoded)
        aligned = side_by_side(utterance, self._normalizer)
        counts = utterance.counts(self._metric)
        return Card(number, utterance, counts, speaker, aligned, audio=self._audio.get(number), is_repeated=is_repeated)
