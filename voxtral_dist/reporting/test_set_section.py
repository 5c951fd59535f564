"""What a report shows of each test set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from voxtral_dist.data.stored.index import read_index
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.errors import UserError
from voxtral_dist.reporting.cards import Card, CardMaker, ChosenUtterances, more_errors
from voxtral_dist.reporting.embedded_audio import AudioLimits, EmbeddedAudio, MissingAudio, StoredAudio, read_audio
from voxtral_dist.reporting.results_folder import ReportOptions, ResultsFolder, configured_name
from voxtral_dist.reporting.statistics import SliceTable, slice_tables
from voxtral_dist.scoring.alignment import Confusion, EditKind, align_words, most_frequent_confusions
from voxtral_dist.scoring.comparison import Pair, PairedComparison, compare_pairs, pair_utterances
from voxtral_dist.scoring.grouping import Grouping
from voxtral_dist.scoring.hypotheses import read_scored
from voxtral_dist.scoring.normalizer import Normalizer, normalizer_of_label
from voxtral_dist.scoring.result_files import read_result
from voxtral_dist.scoring.results import TestSetResult
from voxtral_dist.scoring.utterances import ScoredUtterance
from voxtral_dist.scoring.word_errors import ErrorCounts

_NUM_CONFUSIONS = 20
_MEGABYTE = 10**6


@dataclass(frozen=True)
class Comparison:
    """A test set against the same of a baseline: a negative difference is an improvement."""

    baseline_score: TestSetResult
    result: PairedComparison
    num_better: int
    num_worse: int
    better: tuple[Card, ...]
    worse: tuple[Card, ...]


@dataclass(frozen=True)
class TestSetSection:
    """One test set.

    is_same_normalizer: whether words are aligned by the very normalizer that they were scored by. audio_note: why
    utterances have no audio; None where some have.
    """

    __test__ = False  # pytest takes it for a test

    name: str
    score: TestSetResult
    is_same_normalizer: bool
    slices: tuple[SliceTable, ...]
    confusions: Mapping[EditKind, list[Confusion]]
    most_errors: tuple[Card, ...]
    highest_rates: tuple[Card, ...]
    comparison: Comparison | None
    num_clips: int
    audio_note: str | None


@dataclass(frozen=True)
class SectionReader:
    """Reads the test sets of a report. baseline: where there is one; shared: the test sets that it has too."""

    __test__ = False  # pytest takes it for a test

    results: ResultsFolder
    options: ReportOptions
    baseline: ResultsFolder | None
    shared: Sequence[str]

    def read(self, name: str) -> TestSetSection:
        """One of them.

        Raises:
            UserError: its files are damaged, or do not fit those of the baseline.
        """
        path = _folder_of(self.results) / f"{name}.jsonl"
        score = read_result(path.with_suffix(".json"))
        utterances = read_scored(path)
        _refuse_other_utterances(path, score, utterances)
        used = normalizer_of_label(score.normalizer, self.options.normalizer)
        pairs = self._pairs(name, score, utterances)
        shown = ChosenUtterances.of(utterances, pairs, self.options.num_utterances)
        audio, audio_note = self._audio(name, shown)
        grouping = Grouping(speaker_field=self.options.speaker_field or score.speaker_field)
        cards = CardMaker(used, grouping, audio)
        return TestSetSection(
            name=name,
            score=score,
            is_same_normalizer=used.label == score.normalizer,
            slices=slice_tables(score),
            confusions=_confusions(utterances, used),
            most_errors=cards.plain(shown.most_errors),
            highest_rates=cards.plain(shown.highest_rates),
            comparison=self._comparison(name, pairs, shown, cards, grouping) if pairs else None,
            num_clips=sum(isinstance(clip, EmbeddedAudio) for clip in audio.values()),
            audio_note=audio_note,
        )

    def _pairs(self, name: str, score: TestSetResult, utterances: Sequence[ScoredUtterance]) -> list[Pair]:
        """The baseline's utterances before these; none where it does not have the test set."""
        if self.baseline is None or name not in self.shared:
            return []
        mine, theirs = (_folder_of(one) / f"{name}.jsonl" for one in (self.results, self.baseline))
        label = read_result(theirs.with_suffix(".json")).normalizer
        if label != score.normalizer:
            raise UserError(
                f"`--baseline`: {theirs} was scored by {label}, but {mine} by {score.normalizer}: score one of them "
                "again by `voxtral-dist score --normalizer`."
            )
        paired = pair_utterances(utterances, read_scored(theirs), (mine, theirs))
        return [(before, after) for after, before in paired]

    def _audio(self, name: str, shown: ChosenUtterances) -> tuple[dict[int, EmbeddedAudio | MissingAudio], str | None]:
        stored = self._stored(name)
        if isinstance(stored, MissingAudio):
            return {}, stored.reason
        num_bytes = int(self.options.max_audio_megabytes * _MEGABYTE / len(self.results.test_sets))
        audio = read_audio(shown.in_turns(), stored, AudioLimits(self.options.num_clips, num_bytes))
        reasons = [clip.reason for clip in audio.values() if isinstance(clip, MissingAudio)]
        has_none = audio and len(reasons) == len(audio)
        return audio, f"none of the clips can be played ({reasons[0]})" if has_none else None

    def _stored(self, name: str) -> StoredAudio | MissingAudio:
        """The shards of a test set: those of the options must be there, the configured ones may have moved."""
        if self.options.num_clips == 0:
            return MissingAudio("no clips were asked for")
        config = self.results.config
        if (given := self.options.shards.get(name)) is not None:
            storage = Storage(config.storage if config else None)
            return StoredAudio(read_index([given], storage), storage)
        configured = config.evaluation.test_sets if config else {}
        set_name = configured_name(name, list(configured))
        if config is None or set_name not in configured:
            return MissingAudio(f"nothing tells where its shards are: add `--shards {name}=FOLDER`")
        storage = Storage(config.storage)
        try:
            return StoredAudio(read_index([configured[set_name].shards], storage), storage)
        except (UserError, OSError) as error:
            return MissingAudio(f"its shards cannot be read ({str(error).rstrip('.')}): add `--shards {name}=FOLDER`")

    def _comparison(
        self, name: str, pairs: Sequence[Pair], shown: ChosenUtterances, cards: CardMaker, grouping: Grouping
    ) -> Comparison:
        assert self.baseline is not None, "pairs come from it"
        changes = [more_errors(pair) for pair in pairs]
        return Comparison(
            baseline_score=read_result(_folder_of(self.baseline) / f"{name}.json"),
            result=compare_pairs(pairs, grouping),
            num_better=sum(change < 0 for change in changes),
            num_worse=sum(change > 0 for change in changes),
            better=cards.changed(shown.better),
            worse=cards.changed(shown.worse),
        )


def _confusions(utterances: Sequence[ScoredUtterance], used: Normalizer) -> dict[EditKind, list[Confusion]]:
    wrong = (one for one in utterances if one.words.errors)
    texts = ((one.decoded.reference, one.decoded.hypothesis) for one in wrong)
    alignments = (align_words(*map(used.apply, pair)) for pair in texts)
    return most_frequent_confusions(alignments, _NUM_CONFUSIONS)


def _refuse_other_utterances(path: Path, score: TestSetResult, utterances: Sequence[ScoredUtterance]) -> None:
    found = len(utterances), sum((one.words for one in utterances), ErrorCounts())
    if found != (score.normalized.num_utterances, score.normalized.words):
        raise UserError(
            f"{path} and {path.with_suffix('.json').name} do not belong together: {found[0]} utterances with "
            f"{found[1].errors} word errors against {score.normalized.num_utterances} with "
            f"{score.normalized.words.errors}: write both again by `voxtral-dist score --out`."
        )


def _folder_of(results: ResultsFolder) -> Path:
    assert results.evaluated is not None, "it has test sets"
    return results.evaluated
