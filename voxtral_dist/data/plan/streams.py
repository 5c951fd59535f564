"""Streams: which utterances are drawn, and how often.

A stream is a part of the data with a share of its own in the mixture: a shard set, or one language of it. One scan of
the index, chunk by chunk, filters the utterances and assigns them to streams; afterwards `StreamTable` finds the k-th
utterance of a stream. Without filters and mixtures there is one stream, no scan and no table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.config import TrainDataConfig
from voxtral_dist.data.plan.example_sizes import ExampleSizes
from voxtral_dist.data.plan.filters import TOO_MANY_POSITIONS, TOO_MANY_TARGET_TOKENS, Filters
from voxtral_dist.data.plan.stream_table import SKIPPED, StreamTable
from voxtral_dist.data.stored.index import RecordChunk, ShardIndex
from voxtral_dist.data.stored.shard_set import UNKNOWN_LANGUAGE, Ids
from voxtral_dist.errors import UserError
from voxtral_dist.output.counting import counted

# What to do about utterances that `too_long: refuse` refuses, by the reason.
_REMEDIES = {
    TOO_MANY_TARGET_TOKENS: "raise `max_target_tokens`, cut the recordings into shorter ones",
    TOO_MANY_POSITIONS: "cut the recordings into shorter ones",
}


@dataclass(frozen=True)
class Stream:
    """A part of the data with a share of its own.

    name: the shard set, followed by the language where languages are mixed: `podcasts/de`.
    num_utterances: number of its utterances that pass the filters.
    num_draws: utterances drawn in one epoch of the plan. A stream with more draws than utterances is repeated: each of
        its epochs has another order and draws every utterance once.
    mean_seconds: mean duration of its utterances; 0 where the records were not scanned.
    """

    name: str
    num_utterances: int
    num_draws: int
    mean_seconds: float = 0.0

    @property
    def drawn_seconds(self) -> float:
        """Seconds of audio drawn in one epoch of the plan."""
        return self.num_draws * self.mean_seconds


class Streams:
    """The streams of a training set.

    `streams` are the streams by number, and `skipped` is the number of skipped utterances by reason.
    """

    def __init__(self, streams: Sequence[Stream], skipped: Mapping[str, int], table: StreamTable | None) -> None:
        """Streams over a table; without a table there is one stream, which holds the whole index."""
        self.streams = tuple(streams)
        self.skipped = dict(skipped)
        self._table = table

    @property
    def num_utterances(self) -> int:
        """Number of utterances that pass the filters."""
        return sum(stream.num_utterances for stream in self.streams)

    def utterance_ids(self, stream: int, positions: NDArray[np.int64]) -> Ids:
        """The utterances at the given positions of a stream, which has the order of the index, `(n,)`."""
        return positions if self._table is None else self._table.find(stream, positions)

    def seconds_by_language(self, index: ShardIndex) -> dict[str, float]:
        """Seconds of audio that pass the filters, by ISO 639-1 code or `unknown`, in descending order.

        Args:
            index: the one that the streams were built from; all its records are read.
        """
        milliseconds = np.zeros(UNKNOWN_LANGUAGE + 1)
        for chunk in index.chunks():
            kept: slice | NDArray[np.bool_] = slice(None)
            if self._table is not None:
                kept = self._table.are_in_streams(chunk.first_id, len(chunk.records))
            durations = chunk.records["duration_ms"][kept]
            # Whole numbers, so that their sum does not depend on the division of records into chunks.
            milliseconds += np.bincount(chunk.languages[kept], durations, minlength=len(milliseconds))
        names = dict(enumerate(index.languages)) | {UNKNOWN_LANGUAGE: "unknown"}
        found = sorted(np.flatnonzero(milliseconds).tolist(), key=lambda number: -milliseconds[number])
        return {names[number]: float(milliseconds[number]) / 1000 for number in found}


def build_streams(
    config: TrainDataConfig, index: ShardIndex, set_ends: Mapping[str, int], sizes: ExampleSizes
) -> Streams:
    """Filter the utterances of an index and divide them into streams.

    Args:
        config: filters, weights and temperatures.
        index: all utterances.
        set_ends: for each shard set by name, where its utterances end in the index.
        sizes: what examples cost.

    Raises:
        UserError: no utterance of a set passes the filters, there are too many streams, or `too_long` refuses one.
    """
    filters = Filters(config, sizes, index.languages)
    if not config.mixes_sets and not config.mixes_languages and not filters.can_refuse(index):
        return Streams([Stream("all", len(index), len(index))], {}, None)
    _refuse_unknown_languages(config, index)
    scan = _scan(index, filters, set_ends if config.mixes_sets else {"all": len(index)}, config.mixes_languages)
    _refuse_too_long(config, scan)
    _refuse_empty_sets(scan)
    draws = _draws(config, scan)
    streams = [
        Stream(scan.name(cell, index.languages), count, drawn, seconds / count)
        for cell, count, drawn, seconds in zip(
            scan.cells, scan.counts.tolist(), draws, (scan.milliseconds / 1000.0).tolist(), strict=False
        )
    ]
    return Streams(streams, sum(scan.skipped.values(), Counter()), StreamTable(scan.stream_of_utterance, len(streams)))


# A set and the number of a language in it; None if its languages are not mixed.
_Cell = tuple[str, int | None]


@dataclass
class _Scan:
    """The result of one scan over all records.

    set_ends: where the utterances of each set end in the index.
    stream_of_utterance: the number of each utterance's cell, or `SKIPPED`; uint8 `(N,)`.
    cells: the cells by number; each becomes a stream.
    counts, milliseconds: utterances of each cell and their duration, `(256,)`.
    skipped: number of skipped utterances by set and reason.
    """

    set_ends: Mapping[str, int]
    stream_of_utterance: NDArray[np.uint8]
    cells: list[_Cell] = field(default_factory=list)
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, dtype=np.int64))
    milliseconds: NDArray[np.float64] = field(default_factory=lambda: np.zeros(256))
    skipped: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, chunk: RecordChunk, kept: NDArray[np.bool_], set_name: str, by_language: bool) -> None:
        """Assign the kept records of a chunk, all of one set, to cells."""
        number_of_language = np.zeros(2**16, dtype=np.uint8)
        counts = np.bincount(chunk.languages[kept]) if by_language else np.array([kept.any()])
        for language in np.flatnonzero(counts).tolist():
            number = self._number_of((set_name, language if by_language else None))
            number_of_language[language if by_language else slice(None)] = number
        codes = np.where(kept, number_of_language[chunk.languages], np.uint8(SKIPPED))
        self.stream_of_utterance[chunk.first_id : chunk.first_id + len(codes)] = codes
        self.counts += np.bincount(codes, minlength=256)
        # Whole numbers, so that their sum does not depend on the division of records into chunks.
        self.milliseconds += np.bincount(codes, weights=chunk.records["duration_ms"], minlength=256)

    def name(self, cell: _Cell, languages: Sequence[str]) -> str:
        """The name of the stream that a cell becomes, such as `podcasts/de`."""
        set_name, number = cell
        if number is None:
            return set_name
        language = "unknown" if number == UNKNOWN_LANGUAGE else languages[number]
        return f"{set_name}/{language}"

    def _number_of(self, cell: _Cell) -> int:
        if cell not in self.cells:
            if len(self.cells) == SKIPPED:
                raise UserError(
                    f"`train_data`: the mixture has more than {SKIPPED} streams (shard sets times languages): mix "
                    "fewer sets, or set `language_temperature` to 1."
                )
            self.cells.append(cell)
        return self.cells.index(cell)


def _scan(index: ShardIndex, filters: Filters, set_ends: Mapping[str, int], by_language: bool) -> _Scan:
    scan = _Scan(set_ends, np.empty(len(index), dtype=np.uint8))
    for chunk in index.chunks():
        start = 0
        for set_name, end in set_ends.items():
            mine = slice(max(start - chunk.first_id, 0), max(end - chunk.first_id, 0))
            start = end
            part = RecordChunk(chunk.first_id + mine.start, chunk.records[mine], chunk.languages[mine])
            if len(part.records):
                skipped = scan.skipped.setdefault(set_name, Counter())
                scan.add(part, _kept(filters, part, skipped), set_name, by_language)
    return scan


def _kept(filters: Filters, chunk: RecordChunk, skipped: Counter[str]) -> NDArray[np.bool_]:
    """The mask of the records that pass all filters; the others are counted in `skipped` by their first reason."""
    kept = np.ones(len(chunk.records), dtype=bool)
    for reason, refused in filters.refused(chunk):
        if count := int((kept & refused).sum()):
            skipped[reason] += count
            kept &= ~refused
    return kept


def _refuse_unknown_languages(config: TrainDataConfig, index: ShardIndex) -> None:
    for language in config.languages or ():
        if language not in index.languages:
            raise UserError(
                f"`train_data.languages`: no utterance has the language {language!r}; the languages of the index are "
                f"{', '.join(index.languages) or 'none'}."
            )


def _refuse_too_long(config: TrainDataConfig, scan: _Scan) -> None:
    if config.too_long == "skip":
        return
    for set_name, skipped in scan.skipped.items():
        for reason, remedy in _REMEDIES.items():
            if skipped[reason]:
                raise UserError(
                    f"`train_data.too_long` is `refuse`, but {_set_in_words(set_name)} has "
                    f"{counted(skipped[reason], 'utterance')} {reason}: {remedy}, or set `too_long: skip`."
                )


def _refuse_empty_sets(scan: _Scan) -> None:
    for set_name in scan.set_ends:
        if not any(cell_set == set_name for cell_set, _ in scan.cells):
            reasons = ", ".join(f"{count} {reason}" for reason, count in scan.skipped[set_name].items())
            raise UserError(
                f"`train_data`: no utterance of {_set_in_words(set_name)} passes the filters ({reasons}), so there is "
                "nothing to train on: loosen the filters, or remove the set."
            )


def _set_in_words(set_name: str) -> str:
    return "the training set" if set_name == "all" else f"the set `{set_name}`"


def _draws(config: TrainDataConfig, scan: _Scan) -> list[int]:
    """The number of draws of each stream in an epoch of the plan, which together are the number of utterances.

    Shares are fractions of the drawn audio: a set has its weight, or hours^(1/T) without weights, and a language of it
    hours^(1/T). This is the temperature of multilingual BERT and XLM-R (Conneau et al., arXiv 1911.02116, section 3.1,
    with alpha = 1/T), applied to hours. The mean duration of a stream converts its share of audio to draws.
    """
    seconds, counts = scan.milliseconds[: len(scan.cells)] / 1000.0, scan.counts[: len(scan.cells)]
    set_names = [set_name for set_name, _ in scan.cells]
    share = np.zeros(len(counts))
    for set_name in dict.fromkeys(set_names):
        mine = np.array([name == set_name for name in set_names])
        by_language = seconds[mine] ** (1 / config.language_temperature)
        weight = config.set_weight(set_name, float(seconds[mine].sum()))
        share[mine] = weight * by_language / by_language.sum()
    ideal = share / (seconds / counts)
    # Rounded, because powers differ in their last digits between kinds of processors, and ranks must agree.
    return _largest_remainders(np.round(ideal / ideal.sum() * counts.sum(), 3), int(counts.sum()))


def _largest_remainders(ideal: NDArray[np.float64], total: int) -> list[int]:
    """Round to integers that add up to `total` where possible; each is at least 1, so that no stream is never drawn."""
    floors = np.maximum(1, np.floor(ideal)).astype(int)
    order = np.argsort(-(ideal - floors), kind="stable")
    missing = max(0, total - int(floors.sum()))
    floors[order[:missing]] += 1
    return [int(number) for number in floors]
