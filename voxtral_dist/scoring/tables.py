"""Scores as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from voxtral_dist.scoring.results import TestSetScore, percent
from voxtral_dist.scoring.significance import PairedComparison
from voxtral_dist.scoring.slices import ErrorRates, SliceScore

_HEADER = ("", "WER", "95 % interval", "CER", "S", "D", "I", "words", "utterances", "audio")
_MAX_SLICES = 20


def score_lines(score: TestSetScore) -> Iterator[str]:
    """A table of the rates of a test set and of its slices, and what was counted besides."""
    orthographic = score.orthographic
    whole = (_row(score.normalizer, score), _row(f"{orthographic.normalizer} (orthographic)", orthographic))
    yield from _aligned([_HEADER, *whole, *_slice_rows(score.slices)])
    for name, parts in score.slices.items():
        if len(parts) > _MAX_SLICES:
            yield f"{name}: the {_MAX_SLICES} largest of {len(parts)} slices"
    yield (
        f"{score.num_empty_hypotheses} empty hypotheses, {score.num_empty_references} empty references, "
        f"{score.num_limit_hits} ended by the token limit, {score.num_repetition_loops} repetition loops; "
        f"intervals resample {score.resampled}s"
    )
    if score.biased is not None:
        yield f"B-WER {percent(score.biased.biased_wer)}, U-WER {percent(score.biased.unbiased_wer)}"
    if score.language_identification is not None:
        found = score.language_identification
        yield f"language right in {percent(found.accuracy)} of {found.num_utterances} utterances"


def comparison_line(comparison: PairedComparison) -> str:
    """What a second run changes."""
    if comparison.wer_difference is None:
        return "The references have no words: there is nothing to compare."
    difference = f"Second against first: WER {100 * comparison.wer_difference:+.2f} points"
    return f"{with_certainty(difference, comparison)}, {comparison.num_utterances} utterances"


def with_certainty(difference: str, comparison: PairedComparison) -> str:
    """A difference of error rates as it was said, and what tells it from chance, as far as that is known."""
    said = [f"{difference} {shown_interval(comparison.wer_difference_interval, '+.2f')}".rstrip()]
    if comparison.probability_of_improvement is not None:
        said.append(f"probability of improvement {comparison.probability_of_improvement:.3f}")
    if comparison.p_value is not None:
        said.append(f"p = {comparison.p_value:.2g} (matched pairs)")
    return ", ".join(said)


def _slice_rows(slices: Mapping[str, Mapping[str, SliceScore]]) -> Iterator[tuple[str, ...]]:
    """The largest slices of each field, in their order."""
    for name, parts in slices.items():
        sizes = {label: part.num_utterances for label, part in parts.items()}
        largest = set(sorted(sizes, key=sizes.__getitem__, reverse=True)[:_MAX_SLICES])
        yield from (_row(f"{name} {label}", part) for label, part in parts.items() if label in largest)


def _row(name: str, rates: ErrorRates) -> tuple[str, ...]:
    words = rates.words
    counts = (words.substitutions, words.deletions, words.insertions, words.reference_length)
    size = (str(rates.num_utterances), shown_audio(rates.audio_seconds)) if isinstance(rates, SliceScore) else ("", "")
    interval = shown_interval(rates.wer_interval)
    return (name, percent(rates.wer), interval, percent(rates.cer), *map(str, counts), *size)


def shown_interval(interval: tuple[float, float] | None, form: str = ".2f") -> str:
    """Such as `[17.38, 23.97]`, in percent; nothing where there is none."""
    return "" if interval is None else f"[{100 * interval[0]:{form}}, {100 * interval[1]:{form}}]"


def shown_audio(seconds: float | None) -> str:
    """Such as `1.25 h` or `12.5 s`; nothing where it is not known."""
    if seconds is None:
        return ""
    return f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds:.1f} s"


def _aligned(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        yield "  ".join((name.ljust(widths[0]), *right)).rstrip()
