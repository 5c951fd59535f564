"""Error rates of parts of a test set: each language, each range of durations, each value of a field."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from voxtral_dist.config import EvaluationConfig
from voxtral_dist.scoring.intervals import Interval, Unit, bootstrap_interval, resampling_units
from voxtral_dist.scoring.utterances import DecodedUtterance, ScoredUtterance
from voxtral_dist.scoring.word_errors import ErrorCounts

UNKNOWN = "unknown"
# What every test set is cut by.
_ALWAYS = ("language", "duration")
DURATION_BOUNDS_SECONDS = (5, 10, 20, 30, 60)
DURATION_RANGES = (
    f"<{DURATION_BOUNDS_SECONDS[0]} s",
    *(f"{low}-{high} s" for low, high in pairwise(DURATION_BOUNDS_SECONDS)),
    f">={DURATION_BOUNDS_SECONDS[-1]} s",
)


@dataclass(frozen=True)
class Grouping:
    """Which fields of samples make slices, besides language and duration, and which one names the speaker."""

    slices: tuple[str, ...] = ()
    speaker_field: str = "speaker"

    @classmethod
    def of(cls, config: EvaluationConfig) -> Grouping:
        """As configured."""
        return cls(config.slices, config.speaker_field)

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields that utterances have to bring."""
        return tuple(dict.fromkeys((*self.slices, self.speaker_field)))

    def unknown_in(self, utterances: Sequence[DecodedUtterance]) -> list[str]:
        """The fields that were asked for and that no utterance has; the default one for speakers is not asked for."""
        asked = [name for name in self.slices if name not in _ALWAYS]
        if self.speaker_field != Grouping.speaker_field:
            asked.append(self.speaker_field)
        return [name for name in dict.fromkeys(asked) if not any(name in one.fields for one in utterances)]

    def speaker(self, utterance: DecodedUtterance) -> str | None:
        """Whose errors go together; None where that is not known."""
        speaker = field_label(utterance.fields.get(self.speaker_field))
        return None if speaker == UNKNOWN else speaker


@dataclass(frozen=True, kw_only=True)
class ErrorRates:
    """Word and character error rates, and the counts that they divide; a rate of nothing is None.

    wer_interval: the central 95 % under a bootstrap of `resampled` units.
    """

    wer: float | None
    wer_interval: Interval | None
    resampled: Unit
    cer: float | None
    words: ErrorCounts
    characters: ErrorCounts


@dataclass(frozen=True, kw_only=True)
class SliceScore(ErrorRates):
    """The rates of a part of a test set; its audio is None where some duration is not known."""

    num_utterances: int
    audio_seconds: float | None


def error_rates(
    words: Sequence[ErrorCounts], characters: Sequence[ErrorCounts], speakers: Sequence[str | None]
) -> ErrorRates:
    """Sums of the counts of utterances, divided once; speakers decide what the interval resamples."""
    units = resampling_units(speakers)
    word_sum, character_sum = sum(words, ErrorCounts()), sum(characters, ErrorCounts())
    return ErrorRates(
        wer=word_sum.rate,
        wer_interval=bootstrap_interval(words, units),
        resampled=units.unit,
        cer=character_sum.rate,
        words=word_sum,
        characters=character_sum,
    )


def score_slice(utterances: Sequence[ScoredUtterance], grouping: Grouping) -> SliceScore:
    """The rates of some utterances after their normalizer."""
    rates = error_rates(
        [one.words for one in utterances],
        [one.characters for one in utterances],
        [grouping.speaker(one) for one in utterances],
    )
    seconds = [one.duration_seconds for one in utterances if one.duration_seconds is not None]
    audio_seconds = sum(seconds) if len(seconds) == len(utterances) else None
    return SliceScore(**vars(rates), num_utterances=len(utterances), audio_seconds=audio_seconds)


def score_slices(utterances: Sequence[ScoredUtterance], grouping: Grouping) -> dict[str, dict[str, SliceScore]]:
    """By field and value: `language` (ISO 639-1), `duration` (such as `5-10 s`), and the chosen fields.

    What has no value is in the slice `unknown`; every utterance is in one slice of each field.
    """
    return {
        name: {label: score_slice(part, grouping) for label, part in _parts(utterances, name).items()}
        for name in dict.fromkeys((*_ALWAYS, *grouping.slices))
    }


def slice_label(utterance: DecodedUtterance, name: str) -> str:
    """The slice that an utterance is in."""
    match name:
        case "language":
            return utterance.language or UNKNOWN
        case "duration":
            return duration_range(utterance.duration_seconds)
        case _:
            return field_label(utterance.fields.get(name))


def duration_range(duration_seconds: float | None) -> str:
    """The range that holds a duration; its lower end belongs to it."""
    if duration_seconds is None:
        return UNKNOWN
    return DURATION_RANGES[bisect_right(DURATION_BOUNDS_SECONDS, duration_seconds)]


def field_label(value: Any) -> str:
    """A value of a sample's json as the name of a slice."""
    if value is None or value == "":
        return UNKNOWN
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _parts(utterances: Sequence[ScoredUtterance], name: str) -> dict[str, list[ScoredUtterance]]:
    parts: dict[str, list[ScoredUtterance]] = {}
    for utterance in utterances:
        parts.setdefault(slice_label(utterance, name), []).append(utterance)
    return {label: parts[label] for label in sorted(parts, key=_order)}


def _order(label: str) -> tuple[bool, int, str]:
    """Durations by length, all else by name, and what is not known last."""
    place = DURATION_RANGES.index(label) if label in DURATION_RANGES else len(DURATION_RANGES)
    return label == UNKNOWN, place, label
