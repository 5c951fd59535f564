"""All that a report shows, as values: read once, then written as HTML and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from voxtral_dist.config import RunConfig
from voxtral_dist.data.index import read_index
from voxtral_dist.data.storage import Storage
from voxtral_dist.errors import UserError
from voxtral_dist.evaluation.alignment import Confusion, EditKind, align_words, most_frequent_confusions
from voxtral_dist.evaluation.hypotheses import read_scored
from voxtral_dist.evaluation.normalizer import Normalizer, normalizer_of_label
from voxtral_dist.evaluation.pairing import Pair, compare_pairs, pair_utterances
from voxtral_dist.evaluation.report import TestSetScore, read_score
from voxtral_dist.evaluation.significance import PairedComparison
from voxtral_dist.evaluation.slices import Grouping
from voxtral_dist.evaluation.utterances import ScoredUtterance
from voxtral_dist.reporting.cards import (
    Card,
    Numbered,
    changed_most,
    in_turns,
    more_errors,
    side_by_side,
    with_highest_rates,
    with_most_errors,
)
from voxtral_dist.reporting.charts import Chart, draw
from voxtral_dist.reporting.clips import Clip, ClipLimits, NoClip, StoredClips, read_clips
from voxtral_dist.reporting.curves import Scores, read_curves
from voxtral_dist.reporting.slice_tables import SliceTable, slice_tables
from voxtral_dist.reporting.source import Source, Step, configured_name, find_source, read_scores

_NUM_CONFUSIONS = 20
_MEGABYTE = 10**6


@dataclass(frozen=True)
class ReportOptions:
    """What a report shows.

    step: of a run. baseline: a run (its newest step) or a folder of results to compare with. shards: those of test sets
    by name, before the configured ones. num_utterances: of each list. num_clips: of each test set.
    max_audio_megabytes: of all clips together, before base64. speaker_field: None takes the configured one.
    """

    step: Step = "newest"
    baseline: Path | None = None
    shards: Mapping[str, str] = field(default_factory=dict)
    num_utterances: int = 20
    num_clips: int = 20
    max_audio_megabytes: float = 20.0
    speaker_field: str | None = None


@dataclass(frozen=True)
class Comparison:
    """A test set against the same of a baseline: a negative difference is an improvement."""

    baseline_score: TestSetScore
    result: PairedComparison
    num_better: int
    num_worse: int
    better: tuple[Card, ...]
    worse: tuple[Card, ...]


@dataclass(frozen=True)
class TestSetReport:
    """One test set.

    is_same_normalizer: whether words are aligned by the very normalizer that they were scored by. audio_note: why
    utterances have no audio; None where some have.
    """

    __test__ = False  # pytest takes it for a test

    name: str
    score: TestSetScore
    is_same_normalizer: bool
    slices: tuple[SliceTable, ...]
    confusions: Mapping[EditKind, list[Confusion]]
    most_errors: tuple[Card, ...]
    highest_rates: tuple[Card, ...]
    comparison: Comparison | None
    num_clips: int
    audio_note: str | None


@dataclass(frozen=True)
class Report:
    """What is written. facts: of the run, by name. notes: what could not be shown, and why."""

    title: str
    facts: Mapping[str, str]
    charts: tuple[Chart, ...]
    scores: Scores
    test_sets: tuple[TestSetReport, ...]
    baseline: str | None
    notes: tuple[str, ...]


def gather_report(folder: Path, options: ReportOptions) -> Report:
    """All that a report of a run, or of a folder of results, shows.

    Raises:
        UserError: there are no results, a file is damaged, or the baseline or the shards of the options do not fit.
    """
    source = find_source(folder, options.step)
    _refuse_unknown_sets(source, options.shards)
    baseline = find_source(options.baseline) if options.baseline else None
    shared = _shared_sets(source, baseline)
    scores = read_scores(source)
    gathering = _Gathering(source, options, baseline, shared)
    return Report(
        title=source.name,
        facts=_facts(source),
        charts=tuple(draw(curve) for curve in read_curves(folder, scores)),
        scores=scores,
        test_sets=tuple(gathering.test_set(name) for name in source.test_sets),
        baseline=str(options.baseline) if options.baseline else None,
        notes=tuple(_notes(source, baseline, shared)),
    )


@dataclass(frozen=True)
class _Gathering:
    """What all test sets of a report have in common."""

    source: Source
    options: ReportOptions
    baseline: Source | None
    shared: Sequence[str]

    @property
    def grouping(self) -> Grouping:
        configured = self.source.config.evaluation.speaker_field if self.source.config else Grouping.speaker_field
        return Grouping(speaker_field=self.options.speaker_field or configured)

    def test_set(self, name: str) -> TestSetReport:
        path = _results_of(self.source) / f"{name}.jsonl"
        utterances = read_scored(path)
        score = read_score(path.with_suffix(".json"))
        used = normalizer_of_label(score.normalizer)
        pairs = self._pairs(name, score, utterances)
        shown = _Shown.of(utterances, pairs, self.options.num_utterances)
        clips, audio_note = self._clips(name, shown)
        cards = _Cards(used, self.grouping, clips)
        return TestSetReport(
            name=name,
            score=score,
            is_same_normalizer=used.label == score.normalizer,
            slices=slice_tables(score),
            confusions=_confusions(utterances, used),
            most_errors=cards.plain(shown.most_errors),
            highest_rates=cards.plain(shown.highest_rates),
            comparison=self._comparison(name, pairs, shown, cards) if pairs else None,
            num_clips=sum(isinstance(clip, Clip) for clip in clips.values()),
            audio_note=audio_note,
        )

    def _pairs(self, name: str, score: TestSetScore, utterances: Sequence[ScoredUtterance]) -> list[Pair]:
        """The baseline's utterances before these; none where it does not have the test set."""
        if self.baseline is None or name not in self.shared:
            return []
        mine, theirs = (_results_of(one) / f"{name}.jsonl" for one in (self.source, self.baseline))
        label = read_score(theirs.with_suffix(".json")).normalizer
        if label != score.normalizer:
            raise UserError(
                f"`--baseline`: {theirs} was scored by {label}, but {mine} by {score.normalizer}: score one of them "
                "again by `voxtral-dist score --normalizer`."
            )
        paired = pair_utterances(utterances, read_scored(theirs), (mine, theirs))
        return [(before, after) for after, before in paired]

    def _clips(self, name: str, shown: _Shown) -> tuple[dict[int, Clip | NoClip], str | None]:
        stored = self._stored(name)
        if isinstance(stored, NoClip):
            return {}, stored.reason
        num_bytes = int(self.options.max_audio_megabytes * _MEGABYTE / len(self.source.test_sets))
        clips = read_clips(shown.in_turns(), stored, ClipLimits(self.options.num_clips, num_bytes))
        reasons = [clip.reason for clip in clips.values() if isinstance(clip, NoClip)]
        has_none = clips and len(reasons) == len(clips)
        return clips, f"none of the clips can be played ({reasons[0]})" if has_none else None

    def _stored(self, name: str) -> StoredClips | NoClip:
        """The shards of a test set: those of the options must be there, the configured ones may have moved."""
        if self.options.num_clips == 0:
            return NoClip("no clips were asked for")
        config = self.source.config
        if (given := self.options.shards.get(name)) is not None:
            storage = Storage(config.storage if config else None)
            return StoredClips(read_index([given], storage), storage)
        configured = config.evaluation.test_sets if config else {}
        set_name = configured_name(name, list(configured))
        if config is None or set_name not in configured:
            return NoClip(f"nothing tells where its shards are: add `--shards {name}=FOLDER`")
        storage = Storage(config.storage)
        try:
            return StoredClips(read_index([configured[set_name].shards], storage), storage)
        except (UserError, OSError) as error:
            return NoClip(f"its shards cannot be read ({str(error).rstrip('.')}): add `--shards {name}=FOLDER`")

    def _comparison(self, name: str, pairs: Sequence[Pair], shown: _Shown, cards: _Cards) -> Comparison:
        assert self.baseline is not None, "pairs come from it"
        changes = [more_errors(pair) for pair in pairs]
        return Comparison(
            baseline_score=read_score(_results_of(self.baseline) / f"{name}.json"),
            result=compare_pairs(pairs, self.grouping),
            num_better=sum(change < 0 for change in changes),
            num_worse=sum(change > 0 for change in changes),
            better=cards.changed(shown.better),
            worse=cards.changed(shown.worse),
        )


@dataclass(frozen=True)
class _Shown:
    """The utterances that a test set shows."""

    most_errors: list[Numbered]
    highest_rates: list[Numbered]
    better: list[tuple[int, Pair]]
    worse: list[tuple[int, Pair]]

    @classmethod
    def of(cls, utterances: Sequence[ScoredUtterance], pairs: Sequence[Pair], num_shown: int) -> _Shown:
        return cls(
            with_most_errors(utterances, num_shown),
            with_highest_rates(utterances, num_shown),
            changed_most(pairs, num_shown, -1),
            changed_most(pairs, num_shown, 1),
        )

    def in_turns(self) -> list[Numbered]:
        better, worse = ([(number, pair[1]) for number, pair in pairs] for pairs in (self.better, self.worse))
        return list(in_turns([self.most_errors, self.highest_rates, worse, better], lambda one: one[0]))


class _Cards:
    """Makes cards in the order in which they stand, of which the first of an utterance has its audio."""

    def __init__(self, used: Normalizer, grouping: Grouping, clips: Mapping[int, Clip | NoClip]) -> None:
        self._used = used
        self._grouping = grouping
        self._clips = clips
        self._seen: set[int] = set()

    def plain(self, numbered: Sequence[Numbered]) -> tuple[Card, ...]:
        return tuple(self._card(number, utterance) for number, utterance in numbered)

    def changed(self, numbered: Sequence[tuple[int, Pair]]) -> tuple[Card, ...]:
        return tuple(
            replace(
                self._card(number, pair[1]), before=side_by_side(pair[0], self._used), more_errors=more_errors(pair)
            )
            for number, pair in numbered
        )

    def _card(self, number: int, utterance: ScoredUtterance) -> Card:
        is_repeated = number in self._seen
        self._seen.add(number)
        speaker = self._grouping.speaker(utterance)
        aligned = side_by_side(utterance, self._used)
        return Card(number, utterance, speaker, aligned, audio=self._clips.get(number), is_repeated=is_repeated)


def _confusions(utterances: Sequence[ScoredUtterance], used: Normalizer) -> dict[EditKind, list[Confusion]]:
    wrong = (one for one in utterances if one.words.errors)
    alignments = (align_words(used.apply(one.reference), used.apply(one.hypothesis)) for one in wrong)
    return most_frequent_confusions(alignments, _NUM_CONFUSIONS)


def _results_of(source: Source) -> Path:
    assert source.results is not None, "it has test sets"
    return source.results


def _refuse_unknown_sets(source: Source, shards: Mapping[str, str]) -> None:
    unknown = [name for name in shards if name not in source.test_sets]
    if unknown:
        known = ", ".join(source.test_sets) or "none"
        raise UserError(f"`--shards`: there are no results of a test set `{unknown[0]}`; there are: {known}.")


def _shared_sets(source: Source, baseline: Source | None) -> list[str]:
    if baseline is None:
        return []
    shared = [name for name in source.test_sets if name in baseline.test_sets]
    if not shared:
        raise UserError(
            f"`--baseline`: {baseline.folder} has no test set of {source.folder} "
            f"({', '.join(source.test_sets) or 'none'}), but {', '.join(baseline.test_sets) or 'none'}."
        )
    return shared


def _notes(source: Source, baseline: Source | None, shared: Sequence[str]) -> list[str]:
    notes = []
    if source.config_error is not None:
        notes.append(f"The configuration of the run cannot be used: {source.config_error}")
    if baseline is not None and (alone := [name for name in source.test_sets if name not in shared]):
        notes.append(f"The baseline has no results of {', '.join(alone)}.")
    if not source.test_sets:
        notes.append("The run has not evaluated any test set.")
    return notes


def _facts(source: Source) -> dict[str, str]:
    facts = {} if source.config is None else _facts_of_config(source.config)
    if source.step is not None:
        others = f", of {len(source.steps)} evaluated steps" if len(source.steps) > 1 else ""
        facts["Step"] = f"{source.step:,}{others}"
    return facts | _facts_of_summary(source.folder / "summary.json")


def _facts_of_config(config: RunConfig) -> dict[str, str]:
    return {
        "Model": config.model.path,
        "Precision": config.model.precision,
        "Steps of the run": f"{config.num_steps:,}",
    }


def _facts_of_summary(path: Path) -> dict[str, str]:
    """What only a finished run knows."""
    summary: Any = None
    if path.is_file():
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return {}
    if not isinstance(summary, dict):
        return {}
    shown = {"engine": "Engine", "world_size": "Ranks", "train_seconds": "Seconds of training"}
    return {name: str(summary[key]) for key, name in shown.items() if key in summary}
