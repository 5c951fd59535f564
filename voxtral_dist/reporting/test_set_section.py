"""The section of a report about one test set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from voxtral_dist.config import ErrorRate
from voxtral_dist.data.stored.index import read_index
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.errors import UserError
from voxtral_dist.output.counting import counted
from voxtral_dist.reporting.cards import Card, CardMaker, ChosenUtterances
from voxtral_dist.reporting.embedded_audio import AudioLimits, EmbeddedAudio, MissingAudio, StoredAudio, read_audio
from voxtral_dist.reporting.flags import flags_of_set
from voxtral_dist.reporting.outcomes import Outcome, outcome_of
from voxtral_dist.reporting.results_folder import ReportOptions, ResultsFolder, configured_name
from voxtral_dist.reporting.statistics import SliceTable, slice_tables
from voxtral_dist.scoring.alignment import Confusion, EditKind, align_words, most_frequent_confusions
from voxtral_dist.scoring.comparison import Pair, pair_utterances
from voxtral_dist.scoring.grouping import Grouping
from voxtral_dist.scoring.hypotheses import read_scored
from voxtral_dist.scoring.normalizer import Normalizer, normalizer_of_label
from voxtral_dist.scoring.result_files import read_result
from voxtral_dist.scoring.results import TestSetResult
from voxtral_dist.scoring.utterances import ScoredUtterance, normalized_pair
from voxtral_dist.scoring.word_errors import ErrorCounts

_NUM_CONFUSIONS = 20
_MEGABYTE = 10**6


@dataclass(frozen=True)
class Comparison:
    """A test set compared with the same test set of a baseline, and cards of the utterances that changed most."""

    outcome: Outcome
    better: tuple[Card, ...]
    worse: tuple[Card, ...]


@dataclass(frozen=True)
class TestSetSection:
    """What the section shows.

    metric: the error rate by which the set is judged. outcomes: the comparisons with the start of the run and with the
    baseline, where they were measured. flags: what is wrong with the hypotheses. is_same_normalizer: whether the words
    are aligned by the same version of the normalizer that scored them. num_clips: utterances with audio. audio_note:
    why no utterance has audio; else None.
    """

    __test__ = False  # keeps pytest from collecting it

    name: str
    result: TestSetResult
    metric: ErrorRate
    outcomes: tuple[Outcome, ...]
    flags: tuple[str, ...]
    is_same_normalizer: bool
    slices: tuple[SliceTable, ...]
    confusions: Mapping[EditKind, list[Confusion]]
    most_errors: tuple[Card, ...]
    highest_rates: tuple[Card, ...]
    comparison: Comparison | None
    num_clips: int
    audio_note: str | None


@dataclass(frozen=True)
class _Earlier:
    """An earlier result of a test set. name: what it is of. pairs: its utterances and the later ones."""

    name: str
    result: TestSetResult
    pairs: Sequence[Pair]


@dataclass(frozen=True)
class SectionReader:
    """Reads sections. shared: the test sets that the baseline has too."""

    folder: ResultsFolder
    options: ReportOptions
    baseline: ResultsFolder | None
    shared: Sequence[str]

    def read(self, name: str) -> TestSetSection:
        """The section of one test set.

        Raises:
            UserError: files of the test set are damaged, or do not fit those of the baseline.
        """
        path = _shown(self.folder) / f"{name}.jsonl"
        result = read_result(path.with_suffix(".json"))
        utterances = read_scored(path)
        _refuse_other_utterances(path, result, utterances)
        normalizer = normalizer_of_label(result.normalizer, self.options.normalizer, self.options.target_text)
        metric = self.folder.metric(name, result)
        start = self._start(name, result, utterances)
        baseline = self._baseline(name, result, utterances)
        shown = ChosenUtterances.of(utterances, baseline.pairs if baseline else (), self.options.num_utterances, metric)
        audio, audio_note = self._audio(name, shown)
        grouping = Grouping(speaker_field=self.options.speaker_field or result.speaker_field)
        cards = CardMaker(normalizer, grouping, metric, audio)
        most_errors, highest_rates = cards.plain(shown.most_errors), cards.plain(shown.highest_rates)
        outcomes = tuple(
            outcome_of(one.name, (one.result, result), one.pairs, grouping, metric) for one in (start, baseline) if one
        )
        comparison = None
        if baseline is not None:
            comparison = Comparison(outcomes[-1], cards.changed(shown.better), cards.changed(shown.worse))
        return TestSetSection(
            name=name,
            result=result,
            metric=metric,
            outcomes=outcomes,
            flags=tuple(flags_of_set(result, metric, outcomes)),
            is_same_normalizer=normalizer.label == result.normalizer,
            slices=slice_tables(result, metric),
            confusions=_confusions(utterances, normalizer),
            most_errors=most_errors,
            highest_rates=highest_rates,
            comparison=comparison,
            num_clips=sum(isinstance(clip, EmbeddedAudio) for clip in audio.values()),
            audio_note=audio_note,
        )

    def _baseline(self, name: str, result: TestSetResult, utterances: Sequence[ScoredUtterance]) -> _Earlier | None:
        """The result of the baseline; None if it does not have the test set."""
        if self.baseline is None or name not in self.shared:
            return None
        mine, theirs = (_shown(one) / f"{name}.jsonl" for one in (self.folder, self.baseline))
        earlier = read_result(theirs.with_suffix(".json"))
        if earlier.normalizer != result.normalizer:
            raise UserError(
                f"`--baseline`: {theirs} was scored by {earlier.normalizer}, but {mine} by {result.normalizer}: score "
                "one of them again with `voxtral-dist score --normalizer`."
            )
        return _Earlier("the baseline", earlier, _paired(utterances, (mine, theirs)))

    def _start(self, name: str, result: TestSetResult, utterances: Sequence[ScoredUtterance]) -> _Earlier | None:
        """The result at the start of the run; None where it was not measured alike."""
        start = self.folder.steps.get(0)
        if start is None or not self.folder.step or not (start / f"{name}.jsonl").is_file():
            return None
        initial = read_result(start / f"{name}.json")
        if initial.normalizer != result.normalizer:
            return None
        try:
            pairs = _paired(utterances, (_shown(self.folder) / f"{name}.jsonl", start / f"{name}.jsonl"))
        except UserError:
            # A resumed run may have been given another test set; nobody asked for this comparison.
            return None
        return _Earlier("the start", initial, pairs)

    def _audio(self, name: str, shown: ChosenUtterances) -> tuple[dict[int, EmbeddedAudio | MissingAudio], str | None]:
        stored = self._stored(name)
        if isinstance(stored, MissingAudio):
            return {}, stored.reason
        num_bytes = int(self.options.max_audio_megabytes * _MEGABYTE / len(self.folder.test_sets))
        audio = read_audio(shown.in_turns(), stored, AudioLimits(self.options.num_clips, num_bytes))
        reasons = [clip.reason for clip in audio.values() if isinstance(clip, MissingAudio)]
        has_none = audio and len(reasons) == len(audio)
        return audio, f"none of the clips can be played ({reasons[0]})" if has_none else None

    def _stored(self, name: str) -> StoredAudio | MissingAudio:
        """The shards of a test set: those in the options must exist, the configured ones may have moved."""
        if self.options.num_clips == 0:
            return MissingAudio("`--num-clips` is 0")
        config = self.folder.config
        if (given := self.options.shards.get(name)) is not None:
            storage = Storage(config.storage if config else None)
            return StoredAudio(read_index([given], storage), storage)
        configured = config.evaluation.test_sets if config else {}
        set_name = configured_name(name, list(configured))
        if config is None or set_name not in configured:
            return MissingAudio(f"the location of its shards is unknown: add `--shards {name}=FOLDER`")
        storage = Storage(config.storage)
        try:
            return StoredAudio(read_index([configured[set_name].shards], storage), storage)
        except (UserError, OSError) as error:
            return MissingAudio(f"its shards cannot be read ({str(error).rstrip('.')}): add `--shards {name}=FOLDER`")


def _paired(utterances: Sequence[ScoredUtterance], paths: tuple[Path, Path]) -> list[Pair]:
    """Pairs of an earlier utterance and one of these, in the order of these; `paths` of these and of the earlier."""
    return [(before, after) for after, before in pair_utterances(utterances, read_scored(paths[1]), paths)]


def _confusions(utterances: Sequence[ScoredUtterance], normalizer: Normalizer) -> dict[EditKind, list[Confusion]]:
    wrong = (one for one in utterances if one.words.errors)
    alignments = (align_words(*normalized_pair(one.decoded, normalizer)) for one in wrong)
    return most_frequent_confusions(alignments, _NUM_CONFUSIONS)


def _refuse_other_utterances(path: Path, result: TestSetResult, utterances: Sequence[ScoredUtterance]) -> None:
    found = len(utterances), sum((one.words for one in utterances), ErrorCounts())
    if found != (result.normalized.num_utterances, result.normalized.words):
        raise UserError(
            f"{path} and {path.with_suffix('.json').name} do not belong together: {counted(found[0], 'utterance')} "
            f"with {counted(found[1].errors, 'word error')} against {result.normalized.num_utterances} with "
            f"{result.normalized.words.errors}: write both again with `voxtral-dist score --out`."
        )


def _shown(folder: ResultsFolder) -> Path:
    assert folder.shown is not None, "it has test sets"
    return folder.shown
