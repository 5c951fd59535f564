"""Scores of saved hypotheses without a model, and whether one run is better than another."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from voxtral_dist.config import TextStep
from voxtral_dist.errors import RankError, UserError
from voxtral_dist.files import option_named_in_errors, refuse_to_replace, write_atomically
from voxtral_dist.scoring.hypotheses import read_hypotheses
from voxtral_dist.scoring.normalizer import normalizer
from voxtral_dist.scoring.pairing import compare_pairs, pair_utterances
from voxtral_dist.scoring.results import (
    TestSetScore,
    refuse_to_replace_others,
    result_files,
    score_test_set,
    write_results,
)
from voxtral_dist.scoring.significance import PairedComparison
from voxtral_dist.scoring.slices import Grouping
from voxtral_dist.scoring.utterances import ScoredUtterance, score_utterance
from voxtral_dist.text.word_list import WordList


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


def score_file(path: Path, options: ScoreOptions) -> ScoredFile:
    """The scores of saved hypotheses.

    Raises:
        UserError: the file or a line of it cannot be used, or the normalizer or the list of words.
    """
    used = normalizer(options.normalizer, options.target_text)
    listed = WordList.read(options.words, "--words") if options.words is not None else None
    decoded = read_hypotheses(path, options.grouping.fields)
    for name in options.grouping.unknown_in(decoded):
        if name in options.grouping.slices:
            raise UserError(f"`--slices {name}`: no line of {path} has this field.")
    try:
        utterances = tuple(score_utterance(utterance, used, listed) for utterance in decoded)
    except RankError as error:
        # There is one process.
        raise UserError(str(error)) from error
    return ScoredFile(path, utterances, score_test_set(utterances, used, grouping=options.grouping))


def refuse_unknown_speakers(scored: Sequence[ScoredFile], grouping: Grouping) -> None:
    """Refuse a field for speakers that was asked for and that no line has: intervals would be too narrow.

    Raises:
        UserError: none of the files has it; one is enough, because they hold the same utterances.
    """
    if all(grouping.speaker_field in grouping.unknown_in(one.utterances) for one in scored):
        paths = " and ".join(str(one.path) for one in scored)
        raise UserError(f"`--speaker-field {grouping.speaker_field}`: no line of {paths} has this field.")


def compare_files(first: ScoredFile, second: ScoredFile, grouping: Grouping) -> PairedComparison:
    """The second file against the first.

    Raises:
        UserError: they do not hold the same utterances with the same references.
    """
    return compare_pairs(pair_utterances(first.utterances, second.utterances, (first.path, second.path)), grouping)


def write_scored(folder: Path, scored: ScoredFile) -> None:
    """Write `NAME.json` and `NAME.jsonl` with the name of the file.

    Raises:
        UserError: they would replace what was scored or what is no result, or the folder cannot be written.
    """
    _refuse_to_replace({folder: scored})
    _write({folder: scored})


def write_comparison(folder: Path, first: ScoredFile, second: ScoredFile, comparison: PairedComparison) -> None:
    """Write the results of both, in folders `first` and `second`, and `comparison.json`.

    Raises:
        UserError: as for `write_scored`.
    """
    results = {folder / "first": first, folder / "second": second}
    path = folder / "comparison.json"
    _refuse_to_replace(results, path)
    refuse_to_replace("--out", path, _is_comparison)
    _write(results)
    files = {"first": str(first.path), "second": str(second.path), "normalizer": first.score.normalizer}
    with option_named_in_errors("--out", folder):
        write_atomically(path, json.dumps(files | asdict(comparison), indent=1))


def _is_comparison(path: Path) -> bool:
    try:
        return "wer_difference" in json.loads(path.read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def _refuse_to_replace(results: Mapping[Path, ScoredFile], *others: Path) -> None:
    """Before anything is written, so that all of it is, or nothing."""
    scored = {one.path.resolve() for one in results.values()}
    targets = [folder / file for folder, one in results.items() for file in result_files(one.path.stem)]
    for target in (*targets, *others):
        if target.resolve() in scored:
            raise UserError(f"`--out`: {target} would be replaced, which is what was scored: name another folder.")
    for folder, one in results.items():
        refuse_to_replace_others("--out", folder, one.path.stem)


def _write(results: Mapping[Path, ScoredFile]) -> None:
    for folder, one in results.items():
        with option_named_in_errors("--out", folder):
            write_results(folder, one.path.stem, one.utterances, one.score)
