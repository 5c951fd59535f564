"""Which utterances a test set shows, and their cards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from voxtral_dist.reporting.cards import (
    Card,
    Numbered,
    changed_most,
    in_turns,
    more_errors,
    side_by_side,
    with_highest_rates,
    with_most_errors,
)
from voxtral_dist.reporting.embedded_audio import Clip, NoClip
from voxtral_dist.scoring.normalizer import Normalizer
from voxtral_dist.scoring.pairing import Pair
from voxtral_dist.scoring.slices import Grouping
from voxtral_dist.scoring.utterances import ScoredUtterance


@dataclass(frozen=True)
class Shown:
    """The utterances that a test set shows, by their numbers."""

    most_errors: list[Numbered]
    highest_rates: list[Numbered]
    better: list[tuple[int, Pair]]
    worse: list[tuple[int, Pair]]

    @classmethod
    def of(cls, utterances: Sequence[ScoredUtterance], pairs: Sequence[Pair], num_shown: int) -> Shown:
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

    def __init__(self, used: Normalizer, grouping: Grouping, clips: Mapping[int, Clip | NoClip]) -> None:
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
        speaker = self._grouping.speaker(utterance)
        aligned = side_by_side(utterance, self._used)
        return Card(number, utterance, speaker, aligned, audio=self._clips.get(number), is_repeated=is_repeated)
