"""The same utterances in two runs, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from voxtral_dist.errors import UserError
from voxtral_dist.scoring.intervals import resampling_units
from voxtral_dist.scoring.significance import PairedComparison, compare_runs
from voxtral_dist.scoring.slices import Grouping
from voxtral_dist.scoring.utterances import ScoredUtterance

Pair = tuple[ScoredUtterance, ScoredUtterance]


def pair_utterances(
    first: Sequence[ScoredUtterance], second: Sequence[ScoredUtterance], paths: tuple[Path, Path]
) -> list[Pair]:
    """Utterances with the same key, or in the same place where keys are missing or not unique.

    Args:
        first: the utterances of one run; pairs are in their order.
        second: those of the other.
        paths: the files that hold them, for the sentence of an error.

    Raises:
        UserError: they are not the same utterances with the same references.
    """
    by_key = _by_key(second)
    if _by_key(first) is None or by_key is None:
        others = second
        if len(others) != len(first):
            raise _different(paths, f"{len(first)} against {len(others)} utterances without keys")
    else:
        alone = {one.key for one in first} ^ by_key.keys()
        if alone:
            raise _different(paths, f"{len(alone)} keys are in one of them alone, such as {min(alone)!r}")
        others = tuple(by_key[one.key] for one in first)
    pairs = list(zip(first, others, strict=True))
    for number, (one, other) in enumerate(pairs, 1):
        if one.reference != other.reference:
            name = repr(one.key) if one.key else f"utterance {number}"
            raise _different(paths, f"the references of {name} differ")
    return pairs


def compare_pairs(pairs: Sequence[Pair], grouping: Grouping) -> PairedComparison:
    """The second run against the first; speakers are told by either of them."""
    units = resampling_units([grouping.speaker(one) or grouping.speaker(other) for one, other in pairs])
    return compare_runs([one.words for one, _ in pairs], [other.words for _, other in pairs], units)


def _by_key(utterances: Sequence[ScoredUtterance]) -> dict[str, ScoredUtterance] | None:
    """None where an utterance has no key, or two have the same."""
    by_key = {one.key: one for one in utterances}
    return by_key if "" not in by_key and len(by_key) == len(utterances) else None


def _different(paths: tuple[Path, Path], reason: str) -> UserError:
    return UserError(
        f"{paths[0]} and {paths[1]} do not hold the same utterances ({reason}): a comparison needs two runs "
        "on one test set."
    )
