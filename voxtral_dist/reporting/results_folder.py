"""A folder of results: a run with its evaluated steps, or bare `NAME.json` and `NAME.jsonl`; and what to show of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from voxtral_dist.config import RunConfig, load_config
from voxtral_dist.errors import UserError
from voxtral_dist.reporting.curves import read_rows
from voxtral_dist.scoring.result_files import read_result
from voxtral_dist.scoring.results import TestSetResult
from voxtral_dist.training.selection import selected_step


@dataclass(frozen=True)
class ReportOptions:
    """What a report shows.

    step: of a run. baseline: a run (its newest step) or a folder of results to compare with. shards: those of test sets
    by name, before the configured ones. num_utterances: of each list. num_clips: of each test set.
    max_audio_megabytes: of all clips together, before base64. speaker_field: None takes that of the scores.
    normalizer: the function of the user that may be run where results were normalized by it.
    """

    step: Step = "newest"
    baseline: Path | None = None
    shards: Mapping[str, str] = field(default_factory=dict)
    num_utterances: int = 20
    num_clips: int = 20
    max_audio_megabytes: float = 20.0
    speaker_field: str | None = None
    normalizer: str | None = None


Step = int | Literal["newest", "best"]


@dataclass(frozen=True)
class ResultsFolder:
    """Where the results of a report lie.

    folder: that was given. evaluated: with `NAME.json` and `NAME.jsonl`; None of a run that evaluated nothing. step: of
    these results. steps: all evaluated ones. rows: of `metrics.jsonl`. config: of the run; config_error: why there is
    none.
    """

    folder: Path
    evaluated: Path | None
    step: int | None = None
    steps: Mapping[int, Path] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()
    config: RunConfig | None = None
    config_error: str | None = None

    @property
    def name(self) -> str:
        """The last part of the folder."""
        return self.folder.resolve().name

    @property
    def test_sets(self) -> list[str]:
        """Their names, in the order of the configuration."""
        return [] if self.evaluated is None else _in_order(result_names(self.evaluated), self.config)


def read_results_folder(folder: Path, step: Step = "newest") -> ResultsFolder:
    """What a folder holds, and the results of one of its steps.

    Raises:
        UserError: there are no results, or none of this step.
    """
    if not is_run(folder):
        if not result_names(folder):
            raise UserError(
                f"{folder} holds no results: name a run, or a folder with NAME.json and NAME.jsonl as `evaluate --out` "
                "and `score --out` write them."
            )
        if step != "newest":
            raise UserError(f"`--step`: {folder} is a folder of results and no run, so it has no steps: leave it out.")
        return ResultsFolder(folder, folder)
    rows = read_rows(folder / "metrics.jsonl")
    steps = _evaluated_steps(folder, rows)
    config, config_error = _config(folder)
    chosen = _chosen(folder, step, steps, config)
    return ResultsFolder(folder, None if chosen is None else steps[chosen], chosen, steps, rows, config, config_error)


def is_run(folder: Path) -> bool:
    """Whether a run wrote this folder."""
    return (folder / "evaluations").is_dir() or (folder / "metrics.jsonl").is_file()


def result_names(folder: Path) -> list[str]:
    """The test sets whose score and utterances a folder holds."""
    return sorted(path.stem for path in folder.glob("*.json") if path.with_suffix(".jsonl").is_file())


def read_scores(results: ResultsFolder) -> dict[tuple[int, str], TestSetResult]:
    """The scores of all evaluated steps of a run, by step and test set."""
    return {
        (step, name): read_result(folder / f"{name}.json")
        for step, folder in results.steps.items()
        for name in _in_order(result_names(folder), results.config)
    }


def _in_order(names: list[str], config: RunConfig | None) -> list[str]:
    """First those of the configuration, as it has them, each before its lists of words."""
    configured = list(config.evaluation.test_sets) if config else []
    ranks = {name: number for number, name in enumerate(configured)}
    return sorted(names, key=lambda name: (ranks.get(configured_name(name, configured), len(ranks)), name))


def configured_name(name: str, configured: list[str]) -> str:
    """The test set that results belong to: `NAME` of `NAME-distractors-100` too."""
    return name if name in configured else name.rpartition("-distractors-")[0]


def _evaluated_steps(folder: Path, rows: Sequence[Mapping[str, Any]]) -> dict[int, Path]:
    """Those that the run recorded: others were left by an attempt that began again. Without records, all."""
    found = (folder / "evaluations").glob("step-*")
    numbers = {path.name.removeprefix("step-"): path for path in sorted(found) if result_names(path)}
    steps = {int(number): path for number, path in numbers.items() if number.isdecimal()}
    recorded = {row["step"] for row in rows if row["kind"] == "evaluation"}
    return {step: path for step, path in steps.items() if step in recorded} if rows else steps


def _config(folder: Path) -> tuple[RunConfig | None, str | None]:
    """The configuration, or why it cannot be used: results can be shown without it."""
    try:
        return load_config(folder / "config.yaml"), None
    except UserError as error:
        return None, str(error)


def _chosen(folder: Path, step: Step, steps: Mapping[int, Path], config: RunConfig | None) -> int | None:
    if not steps:
        if step != "newest":
            raise UserError(f"`--step`: the run {folder} has not evaluated any step.")
        return None
    match step:
        case "newest":
            return max(steps)
        case "best":
            selected = selected_step(folder)
            return selected if selected in steps else min(steps, key=lambda one: (_first_wer(steps[one], config), one))
        case _ if step not in steps:
            known = ", ".join(map(str, steps))
            raise UserError(f"`--step`: the run {folder} has not evaluated step {step}, but the steps {known}.")
        case _:
            return step


def _first_wer(folder: Path, config: RunConfig | None) -> float:
    """The WER of the first test set."""
    wer = read_result(folder / f"{_in_order(result_names(folder), config)[0]}.json").normalized.wer
    return float("inf") if wer is None else wer
