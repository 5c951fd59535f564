"""Statistics of a set's texts and of how fast they are spoken, and the utterances that differ much from the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.shards.contents import SetContents
from voxtral_dist.shards.summary import UNKNOWN

Quantiles = tuple[float, float, float]
_QUANTILES = (0.05, 0.5, 0.95)
# Of a normal distribution, one in 16,000 is further away from the median than this many standard deviations.
OUTLIER_DEVIATIONS = 4.0
# The logarithms of speaking rates in a corpus of careful readers differ by about this; smaller ones are chance.
_MIN_DEVIATION = 0.1
# With fewer utterances, a median is no measure for the others.
MIN_UTTERANCES = 20


@dataclass(frozen=True)
class LanguageStatistics:
    """Texts and speaking rates of the utterances in one language.

    num_words, num_distinct, num_once: words, different words, and words that occur once; 0 where words are not written
    apart. words, characters: per utterance, as quantiles of 5, 50 and 95 %. words_per_second, characters_per_second:
    of these quantiles; None where words are not written apart, and for answers, which are not what is spoken.
    """

    language: str
    num_utterances: int
    num_words: int
    num_distinct: int
    num_once: int
    words: Quantiles | None
    characters: Quantiles
    words_per_second: Quantiles | None
    characters_per_second: Quantiles | None


@dataclass(frozen=True)
class Outlier:
    """An utterance that is spoken much faster or slower than others of its language.

    rate, median: characters per second, of the utterance and of its language.
    """

    utterance_id: int
    rate: float
    median: float


def language_statistics(contents: SetContents) -> Iterator[LanguageStatistics]:
    """The statistics of each language, the most frequent first."""
    records = contents.index.records
    seconds = np.maximum(records["duration_ms"] / 1000.0, 0.001)
    characters = records["num_chars"].astype(np.float64)
    are_spoken = ~_are_answers(contents)
    for language, ids in _by_language(contents):
        words = contents.words.get(language)
        is_spoken = are_spoken[ids]
        counts = contents.num_words[ids]
        yield LanguageStatistics(
            language=language,
            num_utterances=len(ids),
            num_words=int(counts.sum()),
            num_distinct=0 if words is None else len(words),
            num_once=0 if words is None else sum(count == 1 for count in words.values()),
            words=None if words is None else _quantiles(counts),
            characters=_quantiles(characters[ids]),
            words_per_second=_quantiles((counts / seconds[ids])[is_spoken]) if words and is_spoken.any() else None,
            characters_per_second=_quantiles((characters[ids] / seconds[ids])[is_spoken]) if is_spoken.any() else None,
        )


def outliers(contents: SetContents) -> list[Outlier]:
    """The utterances whose speaking rate is far from that of their language, the furthest first.

    The logarithm of characters per second is compared with its median, in units of the deviation that the median
    absolute deviation estimates (Iglewicz and Hoaglin, 1993).
    """
    records = contents.index.records
    is_spoken = (records["num_chars"] > 0) & (records["duration_ms"] > 0) & ~_are_answers(contents)
    found: list[tuple[float, Outlier]] = []
    for _, ids in _by_language(contents):
        spoken = ids[is_spoken[ids]]
        if len(spoken) < MIN_UTTERANCES:
            continue
        rates = records["num_chars"][spoken] / (records["duration_ms"][spoken] / 1000.0)
        logarithms = np.log(rates)
        distances = np.abs(logarithms - np.median(logarithms))
        distances /= max(1.4826 * float(np.median(distances)), _MIN_DEVIATION)
        median = float(np.median(rates))
        found += [
            (float(distances[place]), Outlier(int(spoken[place]), float(rates[place]), median))
            for place in np.flatnonzero(distances > OUTLIER_DEVIATIONS)
        ]
    return [outlier for _, outlier in sorted(found, key=lambda one: (-one[0], one[1].utterance_id))]


def _by_language(contents: SetContents) -> list[tuple[str, NDArray[np.int64]]]:
    """The names of languages with the numbers of their readable utterances, the most frequent first."""
    numbers = contents.index.records["language"]
    names = dict(enumerate(contents.index.languages))
    is_readable = contents.audio_digests != 0
    groups = [
        (names.get(int(number), UNKNOWN), np.flatnonzero((numbers == number) & is_readable))
        for number in np.unique(numbers)
    ]
    return sorted(((name, ids) for name, ids in groups if len(ids)), key=lambda group: (-len(group[1]), group[0]))


def _are_answers(contents: SetContents) -> NDArray[np.bool_]:
    """Whether each text answers an instruction."""
    sets = contents.index.sets
    return np.repeat(
        [part.layout.instruction is not None for part in sets], [part.num_utterances for part in sets]
    ).astype(bool)


def _quantiles(values: NDArray[np.generic]) -> Quantiles:
    low, middle, high = np.quantile(values.astype(np.float64), _QUANTILES).tolist()
    return low, middle, high
