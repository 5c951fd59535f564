"""Scores of saved hypotheses without a model, and whether one run is better than another."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from voxtral_dist.config import TextStep
from voxtral_dist.data.context import WordList
from voxtral_dist.errors import UserError
from voxtral_dist.evaluation.hypotheses import read_hypotheses
from voxtral_dist.evaluation.normalizer import normalizer
from voxtral_dist.evaluation.pairing import compare_pairs, pair_utterances
from voxtral_dist.evaluation.report import TestSetScore, score_test_set, write_results
from voxtral_dist.evaluation.significance import PairedComparison
from voxtral_dist.evaluation.slices import Grouping
from voxtral_dist.evaluation.utterances import ScoredUtterance, score_utterance


@dataclass(frozen=True)
class ScoreOptions:
    """How hypotheses are scored; see `EvaluationConfig` and `TestContextConfig.words`."""

    normalizer: str = "basic"
    target_text: tuple[TextStep, ...] = ()
    grouping: Grouping = field(default_factory=Grouping)
    words: Path | None = None


@dataclass(frozen=True)
class ScoredFile:
    """A file of hypotheses with its scores."""

    path: Path
    utterances: tuple[ScoredUtterance, ...]
    score: TestSetScore

    def write(self, folder: Path) -> None:
        """Write `NAME.json` and `NAME.jsonl` with the name of the file.

        Raises:
            UserError: that is the file itself, or the folder cannot be written.
        """
        target = folder / f"{self.path.stem}.jsonl"
        if target.resolve() == self.path.resolve():
            raise UserError(f"`--out`: {target} would be replaced, which is what was scored: name another folder.")
        try:
            write_results(folder, self.path.stem, self.utterances, self.score)
        except OSError as error:
            raise UserError(f"`--out`: {folder} cannot be written: {error.strerror}.") from error


def score_file(path: Path, options: ScoreOptions) -> ScoredFile:
    """The scores of saved hypotheses.

    Raises:
        UserError: the file or a line of it cannot be used, or the normalizer or the list of words.
    """
    used = normalizer(options.normalizer, options.target_text)
    listed = WordList.read(options.words, "--words") if options.words is not None else None
    decoded = read_hypotheses(path, options.grouping.fields)
    utterances = tuple(score_utterance(utterance, used, listed) for utterance in decoded)
    return ScoredFile(path, utterances, score_test_set(utterances, used, grouping=options.grouping))


def compare_files(first: ScoredFile, second: ScoredFile, grouping: Grouping) -> PairedComparison:
    """The second file against the first; the speakers are those of the first.

    Raises:
        UserError: they do not hold the same utterances with the same references.
    """
    return compare_pairs(pair_utterances(first.utterances, second.utterances, (first.path, second.path)), grouping)


def write_comparison(folder: Path, first: ScoredFile, second: ScoredFile, comparison: PairedComparison) -> None:
    """Write the results of both, in folders `first` and `second`, and `comparison.json`.

    Raises:
        UserError: see `ScoredFile.write`.
    """
    first.write(folder / "first")
    second.write(folder / "second")
    files = {"first": str(first.path), "second": str(second.path), "normalizer": first.score.normalizer}
    (folder / "comparison.json").write_text(json.dumps(files | asdict(comparison), indent=1), encoding="utf-8")
