"""Which samples are drawn, and how often: filters over the index, and the streams that a mixture is made of.

A stream is what has a share of its own: a shard set, or one language of it. They are found in one scan of the index,
some records at a time; afterwards one byte a sample says which stream it belongs to, and the k-th sample of a stream is
found by counts of blocks. Where nothing is filtered and nothing is mixed, there is one stream, no scan and no table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.config import TrainDataConfig
from voxtral_dist.data.plan.example_sizes import ExampleSizes
from voxtral_dist.data.plan.filters import TOO_MANY_POSITIONS, TOO_MANY_TARGETS, Filters
from voxtral_dist.data.stored.index import RecordChunk, ShardIndex
from voxtral_dist.data.stored.shard_set import UNKNOWN_LANGUAGE, Ids
from voxtral_dist.errors import UserError

_BLOCK_UTTERANCES = 1024
_SKIPPED = 255


@dataclass(frozen=True)
class Stream:
    """Samples that have a share of their own.

    name: of the shard set, and the language where languages are mixed. mean_seconds: of its samples, where it is known.
    num_utterances: different ones. num_draws: drawn in one epoch of the plan; a stream with more draws is gone
    through again and again, each time in another order and without replacement.
    """

    name: str
    num_utterances: int
    num_draws: int
    mean_seconds: float = 0.0

    @property
    def drawn_seconds(self) -> float:
        """Audio that is drawn in a pass."""
        return self.num_draws * self.mean_seconds


class Streams:
    """The streams of a training set, and the samples of each by their position in it."""

    def __init__(self, streams: Sequence[Stream], skipped: Mapping[str, int], table: _StreamTable | None) -> None:
        self.streams = tuple(streams)
        self.skipped = dict(skipped)
        self._table = table

    @property
    def num_utterances(self) -> int:
        """Different ones that can be drawn."""
        return sum(stream.num_utterances for stream in self.streams)

    def utterance_ids(self, stream: int, positions: Ids) -> Ids:
        """The samples at these positions of a stream, which are in the order of the index."""
        return positions if self._table is None else self._table.find(stream, positions)


def build_streams(
    config: TrainDataConfig, index: ShardIndex, set_ends: Mapping[str, int], sizes: ExampleSizes
) -> Streams:
    """Filter an index and divide it into streams.

    Args:
        config: filters, weights and temperatures.
        index: all samples.
        set_ends: for each shard set by name, where its samples end in the index.
        sizes: what examples cost.

    Raises:
        UserError: a set has nothing left to draw, or there are too many streams.
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
    return Streams(streams, sum(scan.skipped.values(), Counter()), _StreamTable(scan.stream_of_utterance, len(streams)))


# A set, and a language of it: None where its languages are not told apart.
_Cell = tuple[str, int | None]


@dataclass
class _Scan:
    """What one look at all records finds.

    stream_of_utterance: the number of a cell, or `_SKIPPED`; uint8 `(N,)`. counts, milliseconds: of each cell.
    """

    set_ends: Mapping[str, int]
    stream_of_utterance: NDArray[np.uint8]
    cells: list[_Cell] = field(default_factory=list)
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, dtype=np.int64))
    milliseconds: NDArray[np.float64] = field(default_factory=lambda: np.zeros(256))
    skipped: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, chunk: RecordChunk, kept: NDArray[np.bool_], set_name: str, by_language: bool) -> None:
        """Divide the kept records of a chunk, which are all of one set, among its cells."""
        number_of_language = np.zeros(2**16, dtype=np.uint8)
        counts = np.bincount(chunk.languages[kept]) if by_language else np.array([kept.any()])
        for language in np.flatnonzero(counts).tolist():
            number = self._number_of((set_name, language if by_language else None))
            number_of_language[language if by_language else slice(None)] = number
        codes = np.where(kept, number_of_language[chunk.languages], np.uint8(_SKIPPED))
        self.stream_of_utterance[chunk.first_id : chunk.first_id + len(codes)] = codes
        self.counts += np.bincount(codes, minlength=256)
        # Whole numbers, so that their sum does not depend on how records are divided into chunks.
        self.milliseconds += np.bincount(codes, weights=chunk.records["duration_ms"], minlength=256)

    def name(self, cell: _Cell, languages: Sequence[str]) -> str:
        """Such as `podcasts/de`."""
        set_name, number = cell
        if number is None:
            return set_name
        language = "unknown" if number == UNKNOWN_LANGUAGE else languages[number]
        return f"{set_name}/{language}"

    def _number_of(self, cell: _Cell) -> int:
        if cell not in self.cells:
            if len(self.cells) == _SKIPPED:
                raise UserError(
                    f"`train_data`: the mixture has more than {_SKIPPED} streams (shard sets times languages): mix "
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
    """Which records pass all filters; the others are counted by the first reason that refuses them."""
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
                f"`train_data.languages`: no sample has the language {language!r}; the index knows "
                f"{', '.join(index.languages) or 'none'}."
            )


def _refuse_too_long(config: TrainDataConfig, scan: _Scan) -> None:
    if config.too_long == "skip":
        return
    for set_name, skipped in scan.skipped.items():
        for reason in (TOO_MANY_TARGETS, TOO_MANY_POSITIONS):
            if skipped[reason]:
                where = "" if set_name == "all" else f" of the set `{set_name}`"
                raise UserError(
                    f"`train_data.too_long` is `refuse`, and {skipped[reason]} samples{where} are {reason}: raise "
                    "`max_target_tokens`, cut the recordings, or set `too_long: skip`."
                )


def _refuse_empty_sets(scan: _Scan) -> None:
    for set_name in scan.set_ends:
        if not any(cell_set == set_name for cell_set, _ in scan.cells):
            reasons = ", ".join(f"{count} {reason}" for reason, count in scan.skipped[set_name].items())
            where = "" if set_name == "all" else f" of the set `{set_name}`"
            raise UserError(
                f"`train_data`: none of the samples{where} passes the filters ({reasons}), so there is nothing to "
                "train on: loosen them, or take the set out."
            )


def _draws(config: TrainDataConfig, scan: _Scan) -> list[int]:
    """How many samples of each stream are drawn in a pass that draws as many as there are.

    Shares are of the audio that is drawn: a set has its weight, or (hours)^(1/T) without weights, and a language of it
    has (hours)^(1/T). This is the temperature of multilingual BERT and XLM-R (Conneau et al., arXiv 1911.02116, section
    3.1, with alpha = 1/T), applied to hours. A share of audio becomes one of samples by the mean length of the stream.
    """
    seconds, counts = scan.milliseconds[: len(scan.cells)] / 1000.0, scan.counts[: len(scan.cells)]
    set_names = [set_name for set_name, _ in scan.cells]
    share = np.zeros(len(counts))
    for set_name in dict.fromkeys(set_names):
        mine = np.array([name == set_name for name in set_names])
        by_language = seconds[mine] ** (1 / config.language_temperature)
        weight = config.set_weight(set_name, float(seconds[mine].sum()))
        share[mine] = weight * by_language / by_language.sum()
    # Streams without any weight in samples would never be drawn: a pass draws at least one of each.
    ideal = share / (seconds / counts)
    # Rounded, because powers differ in their last digits between kinds of processors, and ranks must agree.
    return _largest_remainders(np.round(ideal / ideal.sum() * counts.sum(), 3), int(counts.sum()))


def _largest_remainders(ideal: NDArray[np.float64], total: int) -> list[int]:
    """Whole numbers of at least 1 next to the ideal ones that add up to `total`, where that can be."""
    floors = np.maximum(1, np.floor(ideal)).astype(int)
    order = np.argsort(-(ideal - floors), kind="stable")
    missing = max(0, total - int(floors.sum()))
    floors[order[:missing]] += 1
    return [int(number) for number in floors]


class _StreamTable:
    """Finds the k-th sample of a stream by the counts of each block of samples."""

    def __init__(self, stream_of_utterance: NDArray[np.uint8], num_streams: int) -> None:
        whole = len(stream_of_utterance) - len(stream_of_utterance) % _BLOCK_UTTERANCES
        self._blocks = stream_of_utterance[:whole].reshape(-1, _BLOCK_UTTERANCES)
        # What is left after the whole blocks, on its own so that the large array need not be copied.
        self._last = np.full(_BLOCK_UTTERANCES, _SKIPPED, dtype=np.uint8)
        self._last[: len(stream_of_utterance) - whole] = stream_of_utterance[whole:]
        self._ends = [np.cumsum(self._counts(stream)) for stream in range(num_streams)]

    def find(self, stream: int, positions: Ids) -> Ids:
        """The samples at these positions of the stream, `(n,)`."""
        ends = self._ends[stream]
        blocks = np.searchsorted(ends, positions, side="right")
        inside = positions - np.where(blocks > 0, ends[blocks - 1], 0)
        found = np.empty(len(positions), dtype=np.int64)
        # In parts, so that a large window does not take the memory of all its blocks at a time.
        for part in np.array_split(np.arange(len(positions)), -(-len(positions) // 4096) or 1):
            ranks = np.cumsum(self._rows(blocks[part]) == stream, axis=1, dtype=np.uint16)
            found[part] = (ranks <= inside[part, None]).sum(axis=1)
        utterance_ids: Ids = blocks * _BLOCK_UTTERANCES + found
        return utterance_ids

    def _rows(self, blocks: Ids) -> NDArray[np.uint8]:
        is_last = blocks == len(self._blocks)
        rows = np.empty((len(blocks), _BLOCK_UTTERANCES), dtype=np.uint8)
        rows[~is_last] = self._blocks[blocks[~is_last]]
        rows[is_last] = self._last
        return rows

    def _counts(self, stream: int) -> NDArray[np.int64]:
        parts = [*np.array_split(self._blocks, len(self._blocks) // 4096 + 1), self._last[None]]
        counts: Ids = np.concatenate([(part == stream).sum(axis=1, dtype=np.int64) for part in parts])
        return counts
