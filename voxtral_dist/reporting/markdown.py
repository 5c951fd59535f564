"""A report as Markdown without charts and audio, for a repository or a model card."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from voxtral_dist.output.counting import counted
from voxtral_dist.reporting.cards import Card
from voxtral_dist.reporting.contents import ReportContents
from voxtral_dist.reporting.curves import Results
from voxtral_dist.reporting.outcomes import Outcome
from voxtral_dist.reporting.statistics import MIN_UTTERANCES, SliceTable, other_columns, points
from voxtral_dist.reporting.test_set_section import TestSetSection
from voxtral_dist.scoring.alignment import AlignedWord, EditKind
from voxtral_dist.scoring.deciding_rate import ERROR_UNITS
from voxtral_dist.scoring.results import percent
from voxtral_dist.scoring.tables import format_audio, format_interval, with_certainty

_NUM_CONFUSIONS = 10
_NUM_UTTERANCES = 10
_MARKUP = re.compile(r"([\\`*_{}\[\]()#+!|<>~&$^])")


def render_markdown(report: ReportContents) -> str:
    """The Markdown of a report."""
    return "\n".join(_lines(report)) + "\n"


def plain(text: str) -> str:
    """The text in one line, escaped so that Markdown shows it unchanged."""
    return _MARKUP.sub(r"\\\1", " ".join(text.split())).replace("\\<", "&lt;").replace("\\&", "&amp;")


def _lines(report: ReportContents) -> Iterator[str]:
    yield from (f"# Evaluation of {plain(report.title)}", "")
    yield from _verdict(report)
    facts = dict(report.facts) | ({"Baseline": report.baseline} if report.baseline else {})
    yield from (f"- {name}: {plain(value)}" for name, value in facts.items())
    yield from ("", *(f"> {plain(note)}\n" for note in report.notes))
    if report.test_sets:
        yield from _error_rates(report.test_sets)
    if len({step for step, _ in report.results}) > 1:
        yield from ("## Error rates of each step", "", *_steps(report.results), "")
    for test_set in report.test_sets:
        yield from _test_set(test_set)


def _error_rates(test_sets: Sequence[TestSetSection]) -> Iterator[str]:
    yield from ("## Error rates", "")
    yield from table(
        ("test set", "WER", "95 % interval", "CER", "orthographic WER", "S", "D", "I", "words", "utterances", "audio"),
        [_rates(one) for one in test_sets],
    )
    labels = "; ".join(
        f"{plain(one.name)}: normalizer `{one.result.normalizer}`, interval over {one.result.normalized.resampled}s"
        for one in test_sets
    )
    yield from ("", f"{labels}.", "")
    columns = other_columns([one.result for one in test_sets])
    yield from table(
        ("test set", *(column.title for column in columns)),
        [(plain(one.name), *(column.text(one.result) for column in columns)) for one in test_sets],
    )
    yield ""


def _rates(test_set: TestSetSection) -> tuple[str, ...]:
    rates = test_set.result.normalized
    words = rates.words
    counts = (words.substitutions, words.deletions, words.insertions, words.reference_length, rates.num_utterances)
    normalized = (percent(rates.wer), format_interval(rates.wer_interval), percent(rates.cer))
    sizes = (*map(str, counts), format_audio(rates.audio_seconds))
    return (plain(test_set.name), *normalized, percent(test_set.result.orthographic.wer), *sizes)


def _steps(results: Results) -> Iterator[str]:
    rows = [
        (f"{step:,}", plain(name), percent(rates.wer), format_interval(rates.wer_interval), percent(rates.cer))
        for (step, name), rates in ((key, result.normalized) for key, result in results.items())
    ]
    return table(("step", "test set", "WER", "95 % interval", "CER"), rows)


def _test_set(test_set: TestSetSection) -> Iterator[str]:
    yield from (f"## Test set {plain(test_set.name)}", "")
    for slices in test_set.slices:
        yield from (*_slices(slices), "")
    yield from _confusions(test_set)
    if test_set.most_errors:
        yield from (f"### Utterances with the most errors in {ERROR_UNITS[test_set.metric]}", "")
        yield from ("~~Only in the reference~~, **only in the hypothesis**.", "")
        yield from (_utterance(card) for card in test_set.most_errors[:_NUM_UTTERANCES])
        yield ""


def _verdict(report: ReportContents) -> Iterator[str]:
    """What the report is about, before everything else: each test set before and after, and red flags."""
    yield from (f"**{plain(sentence)}**\n" for sentence in report.verdicts)
    for test_set in report.test_sets:
        for outcome in test_set.outcomes:
            yield f"- {plain(test_set.name)}: {_outcome(outcome)}"
        if not test_set.outcomes:
            rate = f"{test_set.metric.upper()} {percent(test_set.result.normalized.rate(test_set.metric))}"
            yield f"- {plain(test_set.name)}: {rate}, not compared with anything"
        yield from (f"- ⚠ {plain(test_set.name)}: {plain(flag)}" for flag in test_set.flags)
    yield from (f"- ⚠ {plain(flag)}" for flag in report.flags)
    yield ""


def _outcome(outcome: Outcome) -> str:
    paired = outcome.paired
    rates = f"{outcome.metric.upper()} {percent(outcome.before)} → {percent(outcome.after)}"
    difference = f"{rates}, against {outcome.against} {points(paired.difference)}"
    total = counted(paired.num_utterances, "utterance")
    changes = f"{outcome.num_better} of {total} better, {outcome.num_worse} worse"
    return f"{with_certainty(difference, paired)}: **{outcome.said}**; {changes}."


def _slices(slices: SliceTable) -> Iterator[str]:
    rows = [
        (
            plain(row.label) + (" †" if row.is_uncertain else ""),
            percent(row.rates.rate(slices.metric)),
            format_interval(row.interval),
            percent(row.rates.rate(slices.other_metric)),
            str(row.rates.num_utterances),
            format_audio(row.rates.audio_seconds),
        )
        for row in slices.rows
    ]
    metric, other = slices.metric.upper(), slices.other_metric.upper()
    yield from table((plain(slices.field), metric, "95 % interval", other, "utterances", "audio"), rows)
    if slices.has_uncertain:
        yield from ("", f"† fewer than {MIN_UTTERANCES} utterances, or no interval: too few to be certain.")
    if slices.num_skipped:
        yield from ("", f"Not shown: {counted(slices.num_skipped, 'smaller slice')}.")


def _confusions(test_set: TestSetSection) -> Iterator[str]:
    titles: dict[EditKind, str] = {"substitute": "Substitutions", "delete": "Deletions", "insert": "Insertions"}
    for kind, title in titles.items():
        found = test_set.confusions[kind][:_NUM_CONFUSIONS]
        words = (" → ".join(plain(word) for word in (one.reference, one.hypothesis) if word) for one in found)
        said = ", ".join(f"{word} ({one.count})" for word, one in zip(words, found, strict=True))
        yield from (f"{title}: {said or 'none'}", "")


def _utterance(card: Card) -> str:
    one = card.utterance
    words = " ".join(_word(word) for word in card.aligned.words)
    more = f" … and {card.aligned.num_skipped:,} more" if card.aligned.num_skipped else ""
    flags = f" ({', '.join(card.flags)})" if card.flags else ""
    name = plain(one.decoded.key) or f"line {card.number}"
    return f"- {name}: {card.counts.errors} of {card.counts.reference_length}{flags}: {words}{more}"


def _word(word: AlignedWord) -> str:
    if word.kind == "equal":
        return plain(word.reference or "")
    reference = f"~~{plain(word.reference)}~~" if word.reference is not None else ""
    hypothesis = f"**{plain(word.hypothesis)}**" if word.hypothesis is not None else ""
    return f"{reference} {hypothesis}".strip()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a table; the first column is aligned to the left."""
    yield f"| {' | '.join(head)} |"
    yield f"|---|{'---:|' * (len(head) - 1)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
