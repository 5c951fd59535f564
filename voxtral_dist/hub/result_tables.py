"""Tables of a model card: error rates before and after training, of test sets and of their slices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from voxtral_dist.config import ErrorRate
from voxtral_dist.hub.trained_run import Measured
from voxtral_dist.output.counting import counted
from voxtral_dist.reporting.markdown import plain, table
from voxtral_dist.reporting.statistics import MIN_UTTERANCES, SliceTable, points, slice_tables
from voxtral_dist.scoring.comparison import PairedComparison
from voxtral_dist.scoring.deciding_rate import other_rate
from voxtral_dist.scoring.error_rates import ErrorRates
from voxtral_dist.scoring.results import percent
from voxtral_dist.scoring.tables import format_audio, format_interval

_NOT_MEASURED = "not measured"


def results_table(measured: Sequence[Measured]) -> Iterator[str]:
    """One row for each test set."""
    head = (
        "test set",
        "rate",
        "before",
        "after",
        "change",
        "other rate after",
        "orthographic WER after",
        "utterances",
        "audio",
    )
    return table(
        head,
        [
            (
                plain(one.name),
                one.metric.upper(),
                _NOT_MEASURED if one.before is None else _rate(one.before.normalized, one.metric),
                _rate(one.after.normalized, one.metric),
                "" if one.paired is None else _change(one.paired),
                _other_rate(one),
                percent(one.after.orthographic.wer),
                f"{one.after.normalized.num_utterances:,}",
                format_audio(one.after.normalized.audio_seconds),
            )
            for one in measured
        ],
    )


def slice_sections(measured: Measured) -> Iterator[list[str]]:
    """A heading and a table for each field with several slices.

    The field that names speakers is left out, because a card may be public.
    """
    for slices in slice_tables(measured.after, measured.metric):
        if len(slices.rows) > 1 and slices.field != measured.after.speaker_field:
            yield [f"### {plain(measured.name)} by {plain(slices.field)}", "", *_slice_table(measured, slices)]


def _slice_table(measured: Measured, slices: SliceTable) -> Iterator[str]:
    before = measured.before.slices.get(slices.field, {}) if measured.before else {}
    metric = measured.metric
    yield from table(
        (plain(slices.field), f"{metric.upper()} before", f"{metric.upper()} after", "utterances", "audio"),
        [
            (
                plain(row.label) + (" †" if row.is_uncertain else ""),
                _rate(before[row.label], metric) if row.label in before else _NOT_MEASURED,
                _rate(row.rates, metric),
                f"{row.rates.num_utterances:,}",
                format_audio(row.rates.audio_seconds),
            )
            for row in slices.rows
        ],
    )
    if slices.has_uncertain:
        yield from ("", f"† fewer than {MIN_UTTERANCES} utterances, or no interval: too few to be certain.")
    if slices.num_skipped:
        yield from ("", f"Not shown: {counted(slices.num_skipped, 'smaller slice')}.")


def _rate(rates: ErrorRates, metric: ErrorRate) -> str:
    return f"{percent(rates.rate(metric))} {format_interval(rates.interval(metric))}".rstrip()


def _other_rate(measured: Measured) -> str:
    other = other_rate(measured.metric)
    return f"{other.upper()} {percent(measured.after.normalized.rate(other))}"


def _change(paired: PairedComparison) -> str:
    return f"{points(paired.difference)} {format_interval(paired.difference_interval, '+.2f')}".rstrip()
