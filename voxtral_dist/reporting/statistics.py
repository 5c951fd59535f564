"""Statistics of a test set as text and as tables of slices, the same in both forms of a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from voxtral_dist.config import ErrorRate
from voxtral_dist.scoring.comparison import MIN_MATCHED_PAIRS
from voxtral_dist.scoring.deciding_rate import other_rate
from voxtral_dist.scoring.error_rates import ErrorRates
from voxtral_dist.scoring.intervals import Interval
from voxtral_dist.scoring.results import TestSetResult, percent


@dataclass(frozen=True)
class Column:
    """A column of the second table of error rates."""

    title: str
    value: Callable[[TestSetResult], float | int | None]
    form: Callable[[float], str]

    def text(self, result: TestSetResult) -> str:
        """The text of a cell; empty if it was not measured."""
        value = self.value(result)
        return "" if value is None else self.form(value)


_COLUMNS = (
    Column("orthographic CER", lambda result: result.orthographic.cer, percent),
    Column("MER", lambda result: result.normalized.words.match_error_rate, percent),
    Column("WIL", lambda result: result.normalized.words.information_lost, percent),
    Column("punctuation errors", lambda result: getattr(result.punctuation, "match_error_rate", None), percent),
    Column("without spaces: WER all or nothing", lambda result: result.num_without_spaces or None, str),
    Column("empty hypotheses", lambda result: result.num_empty_hypotheses, str),
    Column("empty references", lambda result: result.num_empty_references, str),
    Column("token limit hit", lambda result: result.num_limit_hits, str),
    Column("repetition loops", lambda result: result.num_repetition_loops, str),
    Column("language right", lambda result: getattr(result.language_identification, "accuracy", None), percent),
    Column("B-WER", lambda result: getattr(result.biased, "biased_wer", None), percent),
    Column("U-WER", lambda result: getattr(result.biased, "unbiased_wer", None), percent),
    Column("RTFx", lambda result: result.rtfx, "{:.1f}".format),
    Column("loss", lambda result: result.measured.loss, "{:.4f}".format),
    Column("perplexity", lambda result: result.measured.perplexity, "{:.4g}".format),
)


def other_columns(results: Sequence[TestSetResult]) -> list[Column]:
    """The columns that some test set has values for."""
    return [column for column in _COLUMNS if any(column.value(result) is not None for result in results)]


def points(difference: float | None) -> str:
    """A difference of rates in percentage points, with its sign."""
    return "n/a" if difference is None else f"{100 * difference:+.2f} points"


MAX_SLICES = 50
# With fewer utterances, the resamples of a bootstrap differ too little, and its interval is too narrow.
MIN_UTTERANCES = MIN_MATCHED_PAIRS


@dataclass(frozen=True)
class SliceRow:
    """One slice.

    interval: of its rate. dot, low, high: the rate and the ends of its interval, from 0 to 1 on the scale of the table.
    """

    label: str
    rates: ErrorRates
    interval: Interval | None
    dot: float | None
    low: float | None
    high: float | None

    @property
    def is_uncertain(self) -> bool:
        """Whether the slice is too small for a certain rate."""
        return self.rates.num_utterances < MIN_UTTERANCES or self.interval is None


@dataclass(frozen=True)
class SliceTable:
    """The slices of a field, the highest rate first, but durations by length.

    metric: the rate by which the test set is judged. num_skipped: small slices not shown.
    """

    field: str
    metric: ErrorRate
    rows: tuple[SliceRow, ...]
    num_skipped: int

    @property
    def other_metric(self) -> ErrorRate:
        """The other rate, which stands beside it."""
        return other_rate(self.metric)

    @property
    def has_uncertain(self) -> bool:
        """Whether any row is marked as uncertain."""
        return any(row.is_uncertain for row in self.rows)


def slice_tables(result: TestSetResult, metric: ErrorRate) -> tuple[SliceTable, ...]:
    """One table for each field."""
    return tuple(_table(field, parts, metric) for field, parts in result.slices.items())


def _table(field: str, parts: Mapping[str, ErrorRates], metric: ErrorRate) -> SliceTable:
    largest = sorted(parts.items(), key=lambda one: -one[1].num_utterances)[:MAX_SLICES]
    chosen = {label for label, _ in largest}
    kept = [(label, part) for label, part in parts.items() if label in chosen]
    if field != "duration":
        kept.sort(key=lambda one: (-(one[1].rate(metric) or 0.0), one[0]))
    scale = max((_end(part, metric) for _, part in kept), default=0.0) or 1.0
    rows = tuple(_row(label, part, metric, scale) for label, part in kept)
    return SliceTable(field, metric, rows, len(parts) - len(kept))


def _end(part: ErrorRates, metric: ErrorRate) -> float:
    interval = part.interval(metric)
    return max(part.rate(metric) or 0.0, interval[1] if interval else 0.0)


def _row(label: str, part: ErrorRates, metric: ErrorRate, scale: float) -> SliceRow:
    interval = part.interval(metric)
    places = (part.rate(metric), *(interval or (None, None)))
    return SliceRow(label, part, interval, *(None if one is None else round(one / scale, 4) for one in places))
