"""The run that trained a model, as its model card tells of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from voxtral_dist.config import ErrorRate, RunConfig
from voxtral_dist.reporting.results_folder import ResultsFolder, is_run, read_results_folder
from voxtral_dist.scoring.comparison import PairedComparison, compare_pairs, pair_utterances
from voxtral_dist.scoring.grouping import Grouping
from voxtral_dist.scoring.hypotheses import read_scored
from voxtral_dist.scoring.result_files import read_result
from voxtral_dist.scoring.results import TestSetResult
from voxtral_dist.training.metrics_file import read_metrics


@dataclass(frozen=True)
class Measured:
    """The results of a test set.

    metric: the error rate by which the set is judged. after: of the exported weights. before, paired: of the initial
    weights, and the comparison with them; None where these were not measured, or by another normalizer.
    """

    name: str
    metric: ErrorRate
    after: TestSetResult
    before: TestSetResult | None = None
    paired: PairedComparison | None = None


@dataclass(frozen=True)
class TrainedRun:
    """A run up to the step whose weights are exported.

    averages: whether moving averages of the weights are exported.
    start: the row of `metrics.jsonl` about its newest start; empty where there is none.
    measured: results of the exported weights; empty where they were not measured.
    """

    config: RunConfig
    step: int
    averages: bool
    start: Mapping[str, Any]
    measured: tuple[Measured, ...]

    @classmethod
    def read(cls, config: RunConfig, run_dir: Path | None, step: int, averages: bool | None = None) -> TrainedRun:
        """Read what a run recorded.

        Args:
            config: of the run.
            run_dir: its folder, where it is known.
            step: the exported one.
            averages: whether moving averages of the weights are exported; None: what the run evaluates.

        Raises:
            UserError: its results are damaged.
        """
        measures_averages = config.optimizer.ema_decay is not None and config.evaluation.ema is not False
        exported = measures_averages if averages is None else averages
        if run_dir is None or not is_run(run_dir):
            return cls(config, step, exported, {}, ())
        starts = [row for row in read_metrics(run_dir / "metrics.jsonl") if row.get("event") in ("started", "resumed")]
        measured = _measured(run_dir, step) if exported == measures_averages else ()
        return cls(config, step, exported, starts[-1] if starts else {}, measured)

    @property
    def audio_seconds(self) -> Mapping[str, float]:
        """Seconds of audio that were trained on by language or `unknown`; empty where they were not recorded."""
        found: Mapping[str, float] = self.start.get("audio_seconds", {})
        return found

    @property
    def languages(self) -> list[str]:
        """ISO 639-1 codes of the training data, the most frequent first; where unknown, those of the test sets."""
        found = list(self.audio_seconds)
        if not found:
            found = [label for one in self.measured for label in one.after.slices.get("language", {})]
        return [language for language in dict.fromkeys(found) if language != "unknown"]


def _measured(run_dir: Path, step: int) -> tuple[Measured, ...]:
    folder = read_results_folder(run_dir)
    if step not in folder.steps:
        return ()
    after, before = folder.steps[step], None if step == 0 else folder.steps.get(0)
    names = replace(folder, shown=after).test_sets
    return tuple(_measured_set(name, folder, after, before) for name in names)


def _measured_set(name: str, folder: ResultsFolder, after: Path, before: Path | None) -> Measured:
    result = read_result(after / f"{name}.json")
    metric = folder.metric(name, result)
    if before is None or not (before / f"{name}.jsonl").is_file():
        return Measured(name, metric, result)
    initial = read_result(before / f"{name}.json")
    if initial.normalizer != result.normalizer:
        return Measured(name, metric, result)
    paths = before / f"{name}.jsonl", after / f"{name}.jsonl"
    pairs = pair_utterances(read_scored(paths[0]), read_scored(paths[1]), paths)
    compared = compare_pairs(pairs, Grouping(speaker_field=result.speaker_field), metric)
    return Measured(name, metric, result, initial, compared)
