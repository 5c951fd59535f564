"""Error rates of slices of a test set: each language, each range of durations, each value of a field."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from voxtral_dist.scoring.error_rates import ErrorRates, normalized_rates
from voxtral_dist.scoring.grouping import BUILT_IN_SLICES, UNKNOWN, Grouping, field_label
from voxtral_dist.scoring.utterances import DecodedUtterance, ScoredUtterance

DURATION_BOUNDS_SECONDS = (5, 10, 20, 30, 60)
DURATION_RANGES = (
    f"<{DURATION_BOUNDS_SECONDS[0]} s",
    *(f"{low}-{high} s" for low, high in pairwise(DURATION_BOUNDS_SECONDS)),
    f">={DURATION_BOUNDS_SECONDS[-1]} s",
)


def score_slices(utterances: Sequence[ScoredUtterance], grouping: Grouping) -> dict[str, dict[str, ErrorRates]]:
    """Error rates by field and value: `language` (ISO 639-1), `duration` (such as `5-10 s`), and the chosen fields.

    Every utterance is in one slice of each field; the slice `unknown` holds utterances without a value.
    """
    return {
        name: {label: normalized_rates(part, grouping) for label, part in _parts(utterances, name).items()}
        for name in dict.fromkeys((*BUILT_IN_SLICES, *grouping.slices))
    }


def slice_label(utterance: DecodedUtterance, name: str) -> str:
    """The slice of a field that an utterance is in."""
    match name:
        case "language":
            return utterance.language or UNKNOWN
        case "duration":
            return duration_range(utterance.duration_seconds)
        case _:
            return field_label(utterance.fields.get(name))


def duration_range(duration_seconds: float | None) -> str:
    """The range that holds a duration; a range includes its lower bound."""
    if duration_seconds is None:
        return UNKNOWN
    return DURATION_RANGES[bisect_right(DURATION_BOUNDS_SECONDS, duration_seconds)]


def _parts(utterances: Sequence[ScoredUtterance], name: str) -> dict[str, list[ScoredUtterance]]:
    parts: dict[str, list[ScoredUtterance]] = {}
    for utterance in utterances:
        parts.setdefault(slice_label(utterance.decoded, name), []).append(utterance)
    return {label: parts[label] for label in sorted(parts, key=_order)}


def _order(label: str) -> tuple[bool, int, str]:
    """Sort key: durations by length, other labels by name, `unknown` last."""
    place = DURATION_RANGES.index(label) if label in DURATION_RANGES else len(DURATION_RANGES)
    return label == UNKNOWN, place, label
