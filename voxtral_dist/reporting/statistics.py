"""Statistics of a test set as text and as tables of slices, the same in both forms of a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from voxtral_dist.scoring.comparison import MIN_MATCHED_PAIRS
from voxtral_dist.scoring.error_rates import ErrorRates
from voxtral_dist.scoring.results import TestSetResult, percent


@dataclass(frozen=True)
class Column:
    """What else was counted of a test set, and its text."""

    title: str
    value: Callable[[TestSetResult], float | int | None]
    form: Callable[[float], str]

    def text(self, score: TestSetResult) -> str:
        """Nothing where it was not measured."""
        value = self.value(score)
        return "" if value is None else self.form(value)


_COLUMNS = (
    Column("orthographic CER", lambda score: score.orthographic.cer, percent),
    Column("empty hypotheses", lambda score: score.num_empty_hypotheses, str),
    Column("empty references", lambda score: score.num_empty_references, str),
    Column("token limit hit", lambda score: score.num_limit_hits, str),
    Column("repetition loops", lambda score: score.num_repetition_loops, str),
    Column("language right", lambda score: getattr(score.language_identification, "accuracy", None), percent),
    Column("B-WER", lambda score: getattr(score.biased, "biased_wer", None), percent),
    Column("U-WER", lambda score: getattr(score.biased, "unbiased_wer", None), percent),
    Column("RTFx", lambda score: score.rtfx, "{:.1f}".format),
    Column("loss", lambda score: score.measured.loss, "{:.4f}".format),
    Column("perplexity", lambda score: score.measured.perplexity, "{:.4g}".format),
)


def other_columns(scores: Sequence[TestSetResult]) -> list[Column]:
    """Those that some test set has."""
    return [column for column in _COLUMNS if any(column.value(score) is not None for score in scores)]


def points(difference: float | None) -> str:
    """A difference of rates in points, with its sign."""
    return "n/a" if difference is None else f"{100 * difference:+.2f} points"


MAX_SLICES = 50
# As for a mean of differences: below it, the bootstrap's resamples differ too little, and its interval is too narrow.
MIN_UTTERANCES = MIN_MATCHED_PAIRS


@dataclass(frozen=True)
class SliceRow:
    """One slice. low, dot, high: of the interval and the rate, from 0 to 1 of the table's scale."""

    label: str
    rates: ErrorRates
    dot: float | None
    low: float | None
    high: float | None

    @property
    def is_uncertain(self) -> bool:
        """Whether there is too little of it."""
        return self.rates.num_utterances < MIN_UTTERANCES or self.rates.wer_interval is None


@dataclass(frozen=True)
class SliceTable:
    """The slices of a field; the highest WER first, but durations by length. num_skipped: small ones, of many."""

    field: str
    rows: tuple[SliceRow, ...]
    num_skipped: int

    @property
    def has_uncertain(self) -> bool:
        """Whether a row is marked."""
        return any(row.is_uncertain for row in self.rows)


def slice_tables(score: TestSetResult) -> tuple[SliceTable, ...]:
    """A table for each field."""
    return tuple(_table(field, parts) for field, parts in score.slices.items())


def _table(field: str, parts: Mapping[str, ErrorRates]) -> SliceTable:
    largest = sorted(parts.items(), key=lambda one: -one[1].num_utterances)[:MAX_SLICES]
    chosen = {label for label, _ in largest}
    kept = [(label, part) for label, part in parts.items() if label in chosen]
    if field != "duration":
        kept.sort(key=lambda one: (-(one[1].wer or 0.0), one[0]))
    scale = max((_end(part) for _, part in kept), default=0.0) or 1.0
    return SliceTable(field, tuple(_row(label, part, scale) for label, part in kept), len(parts) - len(kept))


def _end(part: ErrorRates) -> float:
    return max(part.wer or 0.0, part.wer_interval[1] if part.wer_interval else 0.0)


def _row(label: str, part: ErrorRates, scale: float) -> SliceRow:
    low, high = part.wer_interval or (None, None)
    return SliceRow(label, part, *(None if one is None else round(one / scale, 4) for one in (part.wer, low, high)))
