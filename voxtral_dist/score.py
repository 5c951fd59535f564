"""Scoring of saved hypotheses without a model, and comparison of two runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from voxtral_dist.config import ErrorRate, TextStep
from voxtral_dist.errors import RankError, UserError
from voxtral_dist.files import option_named_in_errors, refuse_to_replace, write_atomically
from voxtral_dist.scoring.comparison import PairedComparison, compare_pairs, pair_utterances
from voxtral_dist.scoring.grouping import Grouping
from voxtral_dist.scoring.hypotheses import read_hypotheses
from voxtral_dist.scoring.normalizer import normalizer
from voxtral_dist.scoring.result_files import refuse_to_replace_others, result_files, write_results
from voxtral_dist.scoring.results import TestSetResult, score_test_set
from voxtral_dist.scoring.transcript_pairs import RowKeys
from voxtral_dist.scoring.utterances import ScoredUtterance, score_utterance
from voxtral_dist.text.json_text import parse_json
from voxtral_dist.text.word_list import WordList


@dataclass(frozen=True)
class ScoreOptions:
    """Options of scoring; see `EvaluationConfig` and `TestContextConfig.words`.

    keys: where the rows of files have what. metric: the error rate by which two files are compared.
    """

    normalizer: str = "basic"
    target_text: tuple[TextStep, ...] = ()
    grouping: Grouping = field(default_factory=Grouping)
    words: Path | None = None
    keys: RowKeys = field(default_factory=RowKeys)
    metric: ErrorRate = "wer"


@dataclass(frozen=True)
class ScoredFile:
    """A file of hypotheses with its scored utterances and their result."""

    path: Path
    utterances: tuple[ScoredUtterance, ...]
    result: TestSetResult


def score_file(path: Path, options: ScoreOptions) -> ScoredFile:
    """Score a file of saved hypotheses.

    Raises:
        UserError: the file, a line of it, the normalizer or the list of words cannot be used.
    """
    used = normalizer(options.normalizer, options.target_text)
    listed = WordList.read(options.words, "--words") if options.words is not None else None
    decoded = read_hypotheses(path, options.grouping.fields, options.keys)
    for name in options.grouping.unknown_in(decoded):
        if name in options.grouping.slices:
            raise UserError(f"`--slices {name}`: no line of {path} has this field.")
    try:
        utterances = tuple(score_utterance(utterance, used, listed) for utterance in decoded)
    except RankError as error:
        # There is only one process.
        raise UserError(str(error)) from error
    return ScoredFile(path, utterances, score_test_set(utterances, used, grouping=options.grouping))


def refuse_unknown_speakers(scored: Sequence[ScoredFile], grouping: Grouping) -> None:
    """Refuse a requested speaker field that no line has, because intervals would be too narrow.

    Raises:
        UserError: none of the files has it. One file is enough, because they hold the same utterances.
    """
    if all(grouping.speaker_field in grouping.unknown_in(each.decoded for each in one.utterances) for one in scored):
        paths = " and ".join(str(one.path) for one in scored)
        raise UserError(f"`--speaker-field {grouping.speaker_field}`: no line of {paths} has this field.")


def compare_files(
    first: ScoredFile, second: ScoredFile, grouping: Grouping, metric: ErrorRate = "wer"
) -> PairedComparison:
    """Compare the second file with the first.

    Raises:
        UserError: they do not hold the same utterances with the same references.
    """
    pairs = pair_utterances(first.utterances, second.utterances, (first.path, second.path))
    return compare_pairs(pairs, grouping, metric)


def write_scored(folder: Path, scored: ScoredFile) -> None:
    """Write `NAME.json` and `NAME.jsonl`, where NAME is that of the scored file.

    Raises:
        UserError: they would replace the scored file or a file that is not a result, or the folder cannot be written.
    """
    _refuse_to_replace({folder: scored})
    _write({folder: scored})


def write_comparison(folder: Path, first: ScoredFile, second: ScoredFile, comparison: PairedComparison) -> None:
    """Write the results of both files into `first` and `second`, and `comparison.json` beside them.

    Raises:
        UserError: as for `write_scored`.
    """
    results = {folder / "first": first, folder / "second": second}
    path = folder / "comparison.json"
    _refuse_to_replace(results, path)
    refuse_to_replace("--out", path, _is_comparison)
    _write(results)
    files = {"first": str(first.path), "second": str(second.path), "normalizer": first.result.normalizer}
    with option_named_in_errors("--out", folder):
        write_atomically(path, json.dumps(files | asdict(comparison), indent=1))


def _is_comparison(path: Path) -> bool:
    try:
        return "difference" in parse_json(path.read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def _refuse_to_replace(results: Mapping[Path, ScoredFile], *others: Path) -> None:
    """Check all targets before anything is written, so that a refused command writes nothing."""
    scored = {one.path.resolve() for one in results.values()}
    targets = [folder / file for folder, one in results.items() for file in result_files(one.path.stem)]
    for target in (*targets, *others):
        if target.resolve() in scored:
            raise UserError(f"`--out`: {target} would be replaced, but it is the scored file: choose another folder.")
    for folder, one in results.items():
        refuse_to_replace_others("--out", folder, one.path.stem)


def _write(results: Mapping[Path, ScoredFile]) -> None:
    for folder, one in results.items():
        with option_named_in_errors("--out", folder):
            write_results(folder, one.path.stem, one.utterances, one.result)
