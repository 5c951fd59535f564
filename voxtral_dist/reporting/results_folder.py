"""A folder of results, which is a run or the output of `evaluate` and `score`, and the options of its report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from voxtral_dist.config import ErrorRate, RunConfig, TextStep, load_config
from voxtral_dist.errors import UserError
from voxtral_dist.reporting.curves import read_rows
from voxtral_dist.scoring.result_files import read_result
from voxtral_dist.scoring.results import TestSetResult
from voxtral_dist.training.selection import selected_step

Step = int | Literal["newest", "best"]


@dataclass(frozen=True)
class ReportOptions:
    """What a report shows.

    step: an evaluated step of a run, by number, the newest or the best. baseline: a run, of which the newest step is
    taken, or a folder of results. shards: folders by test set; they override the run's configuration. num_utterances:
    maximum per list. num_clips: maximum per test set. max_audio_megabytes: size of all clips together before base64.
    speaker_field: None for that of the results. normalizer, target_text: functions of the user, which may be run if
    results were normalized by them.
    """

    step: Step = "newest"
    baseline: Path | None = None
    shards: Mapping[str, str] = field(default_factory=dict)
    num_utterances: int = 20
    num_clips: int = 20
    max_audio_megabytes: float = 20.0
    speaker_field: str | None = None
    normalizer: str | None = None
    target_text: tuple[TextStep, ...] = ()


@dataclass(frozen=True)
class ResultsFolder:
    """A run, or a bare folder of `NAME.json` and `NAME.jsonl`, and the results in it that a report shows.

    path: as given. shown: the folder of the results; None if the run has not evaluated anything. step: of these
    results; None without steps. steps: folders of all evaluated steps. rows: of `metrics.jsonl`. config: of the run.
    config_error: why it cannot be used.
    """

    path: Path
    shown: Path | None
    step: int | None = None
    steps: Mapping[int, Path] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()
    config: RunConfig | None = None
    config_error: str | None = None

    @property
    def name(self) -> str:
        """The last component of the path."""
        return self.path.resolve().name

    @property
    def test_sets(self) -> list[str]:
        """Names of the test sets with results, in the order of the configuration."""
        return [] if self.shown is None else _in_order(result_names(self.shown), self.config)

    def metric(self, name: str, result: TestSetResult) -> ErrorRate:
        """The error rate by which a test set is judged, the same as for the selection of checkpoints."""
        return _deciding_rate(name, result, self.config)


def read_results_folder(path: Path, step: Step = "newest") -> ResultsFolder:
    """Find the results of a folder, and those of one step if it is a run.

    Raises:
        UserError: there are no results, or none of this step.
    """
    if not is_run(path):
        if not result_names(path):
            raise UserError(
                f"{path} holds no results: name a run, or a folder with NAME.json and NAME.jsonl as `evaluate --out` "
                "and `score --out` write them."
            )
        if step != "newest":
            raise UserError(f"`--step`: {path} is a folder of results without steps, not a run: remove the option.")
        return ResultsFolder(path, path)
    rows = read_rows(path / "metrics.jsonl")
    steps = _evaluated_steps(path, rows)
    config, config_error = _config(path)
    chosen = _chosen(path, step, steps, config)
    return ResultsFolder(path, None if chosen is None else steps[chosen], chosen, steps, rows, config, config_error)


def is_run(path: Path) -> bool:
    """Whether a run wrote this folder."""
    return (path / "evaluations").is_dir() or (path / "metrics.jsonl").is_file()


def result_names(path: Path) -> list[str]:
    """The test sets of which a folder holds `NAME.json` and `NAME.jsonl`."""
    return sorted(file.stem for file in path.glob("*.json") if file.with_suffix(".jsonl").is_file())


def read_results(folder: ResultsFolder) -> dict[tuple[int, str], TestSetResult]:
    """The results of all evaluated steps of a run, by step and test set."""
    return {
        (step, name): read_result(path / f"{name}.json")
        for step, path in folder.steps.items()
        for name in _in_order(result_names(path), folder.config)
    }


def configured_name(name: str, configured: list[str]) -> str:
    """The configured test set that results belong to: `NAME` also for `NAME-distractors-100`."""
    return name if name in configured else name.rpartition("-distractors-")[0]


def _in_order(names: list[str], config: RunConfig | None) -> list[str]:
    """Configured test sets first, in their order, each followed by its variants with lists of words."""
    configured = list(config.evaluation.test_sets) if config else []
    ranks = {name: number for number, name in enumerate(configured)}
    return sorted(names, key=lambda name: (ranks.get(configured_name(name, configured), len(ranks)), name))


def _evaluated_steps(path: Path, rows: Sequence[Mapping[str, Any]]) -> dict[int, Path]:
    """Steps that the run recorded; without a record, all. Others were left behind by an attempt that was repeated."""
    found = (path / "evaluations").glob("step-*")
    numbers = {folder.name.removeprefix("step-"): folder for folder in sorted(found) if result_names(folder)}
    steps = {int(number): folder for number, folder in numbers.items() if number.isdecimal()}
    recorded = {row["step"] for row in rows if row["kind"] == "evaluation"}
    return {step: folder for step, folder in steps.items() if step in recorded} if rows else steps


def _config(path: Path) -> tuple[RunConfig | None, str | None]:
    """The configuration, or why it cannot be used: results can be shown without it."""
    try:
        return load_config(path / "config.yaml"), None
    except UserError as error:
        return None, str(error)


def _chosen(path: Path, step: Step, steps: Mapping[int, Path], config: RunConfig | None) -> int | None:
    if not steps:
        if step != "newest":
            raise UserError(f"`--step`: the run {path} has not evaluated any step.")
        return None
    match step:
        case "newest":
            return max(steps)
        case "best":
            selected = selected_step(path)
            return selected if selected in steps else _best_step(steps, config)
        case _ if step not in steps:
            known = ", ".join(map(str, steps))
            raise UserError(f"`--step`: the run {path} has not evaluated step {step}, only {known}.")
        case _:
            return step


def _best_step(steps: Mapping[int, Path], config: RunConfig | None) -> int:
    """The step with the lowest error rate of the first test set."""
    first = {step: _in_order(result_names(path), config)[0] for step, path in steps.items()}
    results = {step: read_result(steps[step] / f"{name}.json") for step, name in first.items()}
    newest = max(steps)
    metric = _deciding_rate(first[newest], results[newest], config)
    rates = {step: result.normalized.rate(metric) for step, result in results.items()}
    return min(steps, key=lambda step: (math.inf if (rate := rates[step]) is None else rate, step))


def _deciding_rate(name: str, result: TestSetResult, config: RunConfig | None) -> ErrorRate:
    if config is None or config.evaluation.selection is None:
        return result.deciding_rate()
    set_name = configured_name(name, list(config.evaluation.test_sets))
    return result.deciding_rate(config.evaluation.selection.metric_of(set_name))
