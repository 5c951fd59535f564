"""Error rates of a set of utterances: summed counts, and the rates that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from voxtral_dist.config import ErrorRate
from voxtral_dist.scoring.grouping import Grouping
from voxtral_dist.scoring.intervals import Interval, Unit, bootstrap_interval, resampling_units
from voxtral_dist.scoring.utterances import ScoredUtterance
from voxtral_dist.scoring.word_errors import ErrorCounts


@dataclass(frozen=True, kw_only=True)
class ErrorRates:
    """Errors summed over a test set or a slice of it.

    Attributes:
        words, characters: counts, summed over utterances.
        wer_interval, cer_interval: the central 95 % of the rates under a bootstrap of `resampled` units; None for a
            single unit, or without a reference.
        audio_seconds: None where the duration of an utterance is unknown.
    """

    words: ErrorCounts
    characters: ErrorCounts
    wer_interval: Interval | None
    resampled: Unit
    num_utterances: int
    audio_seconds: float | None
    cer_interval: Interval | None = None

    @property
    def wer(self) -> float | None:
        """Word error rate; None without reference words."""
        return self.words.rate

    @property
    def cer(self) -> float | None:
        """Character error rate; None without reference characters."""
        return self.characters.rate

    def rate(self, metric: ErrorRate) -> float | None:
        """The WER or the CER."""
        return self.wer if metric == "wer" else self.cer

    def interval(self, metric: ErrorRate) -> Interval | None:
        """The interval of the WER or of the CER."""
        return self.wer_interval if metric == "wer" else self.cer_interval


def normalized_rates(utterances: Sequence[ScoredUtterance], grouping: Grouping) -> ErrorRates:
    """Error rates after the normalizer."""
    return _rates([one.words for one in utterances], [one.characters for one in utterances], utterances, grouping)


def orthographic_rates(utterances: Sequence[ScoredUtterance], grouping: Grouping) -> ErrorRates:
    """Error rates where case and punctuation count."""
    words = [one.orthographic_words for one in utterances]
    return _rates(words, [one.orthographic_characters for one in utterances], utterances, grouping)


def _rates(
    words: Sequence[ErrorCounts],
    characters: Sequence[ErrorCounts],
    utterances: Sequence[ScoredUtterance],
    grouping: Grouping,
) -> ErrorRates:
    units = resampling_units([grouping.speaker(one.decoded) for one in utterances])
    seconds = [one.decoded.duration_seconds for one in utterances if one.decoded.duration_seconds is not None]
    return ErrorRates(
        words=sum(words, ErrorCounts()),
        characters=sum(characters, ErrorCounts()),
        wer_interval=bootstrap_interval(words, units),
        cer_interval=bootstrap_interval(characters, units),
        resampled=units.unit,
        num_utterances=len(utterances),
        audio_seconds=sum(seconds) if len(seconds) == len(utterances) else None,
    )
