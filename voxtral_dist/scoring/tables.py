"""Results as text for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from voxtral_dist.output.counting import counted
from voxtral_dist.scoring.comparison import PairedComparison
from voxtral_dist.scoring.error_rates import ErrorRates
from voxtral_dist.scoring.results import TestSetResult, percent

_HEADER = ("", "WER", "95 % interval", "CER", "S", "D", "I", "words", "utterances", "audio")
_MAX_SLICES = 20


def result_lines(result: TestSetResult) -> Iterator[str]:
    """A table of the error rates of a test set and its slices, and what else was counted."""
    orthographic = _row(f"{result.orthographic_normalizer} (orthographic)", result.orthographic)
    whole = (_row(result.normalizer, result.normalized), (*orthographic[:-2], "", ""))
    yield from _aligned([_HEADER, *whole, *_slice_rows(result.slices)])
    for name, parts in result.slices.items():
        if len(parts) > _MAX_SLICES:
            yield f"{name}: the {_MAX_SLICES} largest of {counted(len(parts), 'slice')}"
    yield (
        f"{counted(result.num_empty_hypotheses, 'empty hypothesis', plural='empty hypotheses')}, "
        f"{counted(result.num_empty_references, 'empty reference')}, "
        f"{result.num_limit_hits} ended by the token limit, {counted(result.num_repetition_loops, 'repetition loop')}; "
        f"intervals resample {result.normalized.resampled}s"
    )
    yield from _other_rates(result)
    if result.deciding_rate() == "cer":
        yield (
            f"{result.num_without_spaces} of {counted(result.normalized.num_utterances, 'reference')} in languages "
            "without spaces between words: WER is all or nothing there, and CER leaves out spaces; compare by CER"
        )
    if result.biased is not None:
        yield f"B-WER {percent(result.biased.biased_wer)}, U-WER {percent(result.biased.unbiased_wer)}"
    if result.language_identification is not None:
        found = result.language_identification
        yield f"language accuracy {percent(found.accuracy)} of {counted(found.num_utterances, 'utterance')}"


def _other_rates(result: TestSetResult) -> Iterator[str]:
    words, marks = result.normalized.words, result.punctuation
    said = [f"MER {percent(words.match_error_rate)}, WIL {percent(words.information_lost)}"]
    if marks is not None and marks.match_error_rate is not None:
        of = counted(marks.reference_length, "mark")
        counts = f"{marks.substitutions} S, {marks.deletions} D, {marks.insertions} I of {of}"
        said.append(f"punctuation error rate {percent(marks.match_error_rate)} ({counts})")
    yield ", ".join(said)


def comparison_line(comparison: PairedComparison) -> str:
    """The difference of a second run, with its certainty."""
    if comparison.difference is None:
        return "The references are empty: there is nothing to compare."
    difference = f"Second against first: {comparison.metric.upper()} {100 * comparison.difference:+.2f} points"
    return f"{with_certainty(difference, comparison)}, {counted(comparison.num_utterances, 'utterance')}"


def with_certainty(difference: str, comparison: PairedComparison) -> str:
    """Append to the text of a WER difference its interval, probability of improvement and p-value, where known."""
    said = [f"{difference} {format_interval(comparison.difference_interval, '+.2f')}".rstrip()]
    if comparison.probability_of_improvement is not None:
        said.append(f"probability of improvement {comparison.probability_of_improvement:.3f}")
    if comparison.p_value is not None:
        said.append(f"p = {comparison.p_value:.2g} (matched pairs)")
    return ", ".join(said)


def format_interval(interval: tuple[float, float] | None, form: str = ".2f") -> str:
    """An interval in percent, such as `[17.38, 23.97]`; empty for None."""
    return "" if interval is None else f"[{100 * interval[0]:{form}}, {100 * interval[1]:{form}}]"


def format_audio(seconds: float | None) -> str:
    """A duration such as `1.25 h` or `12.5 s`; empty for None."""
    if seconds is None:
        return ""
    return f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds:.1f} s"


def _slice_rows(slices: Mapping[str, Mapping[str, ErrorRates]]) -> Iterator[tuple[str, ...]]:
    """The largest slices of each field, in the order of the field's slices."""
    for name, parts in slices.items():
        sizes = {label: part.num_utterances for label, part in parts.items()}
        largest = set(sorted(sizes, key=sizes.__getitem__, reverse=True)[:_MAX_SLICES])
        yield from (_row(f"{name} {label}", part) for label, part in parts.items() if label in largest)


def _row(name: str, rates: ErrorRates) -> tuple[str, ...]:
    words = rates.words
    counts = (words.substitutions, words.deletions, words.insertions, words.reference_length, rates.num_utterances)
    interval = format_interval(rates.wer_interval)
    return name, percent(rates.wer), interval, percent(rates.cer), *map(str, counts), format_audio(rates.audio_seconds)


def _aligned(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        yield "  ".join((name.ljust(widths[0]), *right)).rstrip()
