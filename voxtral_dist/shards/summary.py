"""Counts and text histograms of a shard set, from its index alone, read in chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.data.stored.index import RecordChunk, ShardIndex
from voxtral_dist.data.stored.shard_set import UNKNOWN_LANGUAGE, Shard
from voxtral_dist.output.counting import counted
from voxtral_dist.shards.skipped import Skipped

DURATION_EDGES_SECONDS = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 15.0, 20.0, 25.0, 30.0, 60.0, 120.0, float("inf"))
RATE_EDGES = (0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0, 18.0, 20.0, 25.0, 30.0, 40.0, float("inf"))
_BAR_WIDTH = 40

Counts = NDArray[np.int64]

# The name of utterances without a language.
UNKNOWN = "unknown"


@dataclass(frozen=True)
class LanguageShare:
    """The utterances of a set in one language."""

    num_utterances: int
    duration_seconds: float


@dataclass(frozen=True)
class SetSummary:
    """The contents of a shard set.

    duration_counts, rate_counts: utterances between neighbouring edges of `DURATION_EDGES_SECONDS` and of `RATE_EDGES`,
    in characters per second. longest, shortest: number and seconds of an utterance.
    """

    num_shards: int
    num_utterances: int
    num_bytes: int
    duration_seconds: float
    num_text_tokens: int
    languages: Mapping[str, LanguageShare]
    duration_counts: Counts
    rate_counts: Counts
    longest: tuple[int, float]
    shortest: tuple[int, float]
    skipped: Skipped

    def lines(self) -> Iterator[str]:
        """The summary as lines of text."""
        shares = ", ".join(f"{name} {of.num_utterances} ({hours(of.duration_seconds)})" for name, of in self.by_size())
        total = f"{counted(self.num_utterances, 'utterance')}, {hours(self.duration_seconds)}"
        tokens = counted(self.num_text_tokens, "text token")
        yield f"{total}, {counted(self.num_shards, 'shard')}, {self.num_bytes / 1e6:.1f} MB, {tokens}"
        yield f"languages: {shares}"
        yield "duration in seconds:"
        yield from histogram_lines(DURATION_EDGES_SECONDS, self.duration_counts)
        yield from skipped_lines(self.skipped)

    def by_size(self) -> list[tuple[str, LanguageShare]]:
        """The languages, sorted by descending duration."""
        return sorted(self.languages.items(), key=lambda entry: (-entry[1].duration_seconds, entry[0]))


def summarize(index: ShardIndex, skipped: Skipped | None = None) -> SetSummary:
    """Summarize an index, in memory that does not grow with it."""
    return summarize_chunks(index.chunks(), index.shards, index.languages, skipped)


def summarize_chunks(
    chunks: Iterable[RecordChunk],
    shards: Sequence[Shard],
    languages: Sequence[str],
    skipped: Skipped | None = None,
) -> SetSummary:
    """Summarize the records of shards, which may be none."""
    total = _Total(len(languages))
    for chunk in chunks:
        total.add(chunk)
    names = dict(enumerate(languages)) | {len(languages): UNKNOWN}
    return SetSummary(
        num_shards=len(shards),
        num_utterances=sum(shard.num_utterances for shard in shards),
        num_bytes=sum(shard.num_bytes for shard in shards),
        duration_seconds=float(total.seconds_by_language.sum()),
        num_text_tokens=total.num_text_tokens,
        languages={
            names[number]: LanguageShare(int(count), float(total.seconds_by_language[number]))
            for number, count in enumerate(total.count_by_language)
            if count
        },
        duration_counts=total.duration_counts,
        rate_counts=total.rate_counts,
        longest=total.longest,
        shortest=total.shortest,
        skipped=skipped or Skipped(),
    )


def histogram_lines(edges: Sequence[float], counts: Counts) -> Iterator[str]:
    """A bar for each range between neighbouring edges, without empty ranges at both ends."""
    filled = np.flatnonzero(counts)
    for number in range(filled[0], filled[-1] + 1) if len(filled) else ():
        low, high = edges[number], edges[number + 1]
        name = f"{low:g} and more" if high == float("inf") else f"{low:g} to {high:g}"
        bar = "█" * -(-int(counts[number]) * _BAR_WIDTH // int(counts.max()))
        yield f"  {name:>12} {bar:<{_BAR_WIDTH}} {counts[number]}"


def skipped_lines(skipped: Skipped) -> Iterator[str]:
    """Counts by cause and the first reasons; nothing if nothing was skipped."""
    if not skipped.count:
        return
    causes = ", ".join(f"{count} {cause}" for cause, count in sorted(skipped.causes.items(), key=_largest_first))
    yield f"skipped {skipped.count}: {causes}"
    yield from (f"  {reason}" for reason in skipped.first_reasons)
    if skipped.count > len(skipped.first_reasons):
        yield f"  and {skipped.count - len(skipped.first_reasons)} more"


def hours(seconds: float) -> str:
    """A duration as text in hours."""
    return f"{seconds / 3600:.2f} h"


class _Total:
    """Sums over chunks of an index. The last language counts utterances of unknown language."""

    def __init__(self, num_languages: int) -> None:
        self.count_by_language = np.zeros(num_languages + 1, dtype=np.int64)
        self.seconds_by_language = np.zeros(num_languages + 1)
        self.duration_counts: Counts = np.zeros(len(DURATION_EDGES_SECONDS) - 1, dtype=np.int64)
        self.rate_counts: Counts = np.zeros(len(RATE_EDGES) - 1, dtype=np.int64)
        self.num_text_tokens = 0
        self.longest = (0, -1.0)
        self.shortest = (0, float("inf"))

    def add(self, chunk: RecordChunk) -> None:
        """Add the records of a chunk."""
        seconds = chunk.records["duration_ms"] / 1000.0
        languages = np.where(
            chunk.languages == UNKNOWN_LANGUAGE, len(self.count_by_language) - 1, chunk.languages
        ).astype(np.int64)
        self.count_by_language += np.bincount(languages, minlength=len(self.count_by_language))
        self.seconds_by_language += np.bincount(languages, seconds, minlength=len(self.count_by_language))
        self.num_text_tokens += int(chunk.records["num_text_tokens"].sum(dtype=np.int64))
        rates = chunk.records["num_chars"] / np.maximum(seconds, 0.001)
        self.duration_counts += np.histogram(seconds, DURATION_EDGES_SECONDS)[0]
        self.rate_counts += np.histogram(rates, RATE_EDGES)[0]
        longest, shortest = int(seconds.argmax()), int(seconds.argmin())
        if seconds[longest] > self.longest[1]:
            self.longest = (chunk.first_id + longest, float(seconds[longest]))
        if seconds[shortest] < self.shortest[1]:
            self.shortest = (chunk.first_id + shortest, float(seconds[shortest]))


def _largest_first(entry: tuple[str, int]) -> tuple[int, str]:
    return -entry[1], entry[0]
