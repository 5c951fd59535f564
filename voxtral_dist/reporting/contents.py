"""All that a report shows, as values: read once, then written as HTML and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxtral_dist.config import RunConfig
from voxtral_dist.errors import UserError
from voxtral_dist.reporting.charts import Chart, draw
from voxtral_dist.reporting.curves import Scores, curves_of
from voxtral_dist.reporting.results_folder import ReportOptions, ResultsFolder, read_results_folder, read_scores
from voxtral_dist.reporting.test_set_section import SectionReader, TestSetSection


@dataclass(frozen=True)
class ReportContents:
    """What is written. facts: of the run, by name. notes: what could not be shown, and why."""

    title: str
    facts: Mapping[str, str]
    charts: tuple[Chart, ...]
    scores: Scores
    test_sets: tuple[TestSetSection, ...]
    baseline: str | None
    notes: tuple[str, ...]


def read_contents(folder: Path, options: ReportOptions) -> ReportContents:
    """All that a report of a run, or of a folder of results, shows.

    Raises:
        UserError: there are no results, a file is damaged, or the baseline or the shards of the options do not fit.
    """
    results = read_results_folder(folder, options.step)
    _refuse_unknown_sets(results, options.shards)
    baseline = read_results_folder(options.baseline) if options.baseline else None
    shared = _shared_sets(results, baseline)
    scores = read_scores(results)
    reader = SectionReader(results, options, baseline, shared)
    return ReportContents(
        title=results.name,
        facts=_facts(results),
        charts=tuple(draw(curve) for curve in curves_of(results.rows, scores)),
        scores=scores,
        test_sets=tuple(reader.read(name) for name in results.test_sets),
        baseline=str(options.baseline) if options.baseline else None,
        notes=tuple(_notes(results, baseline, shared)),
    )


def _refuse_unknown_sets(results: ResultsFolder, shards: Mapping[str, str]) -> None:
    unknown = [name for name in shards if name not in results.test_sets]
    if unknown:
        known = ", ".join(results.test_sets) or "none"
        raise UserError(f"`--shards`: there are no results of a test set `{unknown[0]}`; there are: {known}.")


def _shared_sets(results: ResultsFolder, baseline: ResultsFolder | None) -> list[str]:
    if baseline is None:
        return []
    shared = [name for name in results.test_sets if name in baseline.test_sets]
    if not shared:
        raise UserError(
            f"`--baseline`: {baseline.folder} has no test set of {results.folder} "
            f"({', '.join(results.test_sets) or 'none'}), but {', '.join(baseline.test_sets) or 'none'}."
        )
    return shared


def _notes(results: ResultsFolder, baseline: ResultsFolder | None, shared: Sequence[str]) -> list[str]:
    notes = []
    if results.config_error is not None:
        notes.append(f"The configuration of the run cannot be used: {results.config_error}")
    if baseline is not None and (alone := [name for name in results.test_sets if name not in shared]):
        notes.append(f"The baseline has no results of {', '.join(alone)}.")
    if not results.test_sets:
        notes.append("The run has not evaluated any test set.")
    return notes


def _facts(results: ResultsFolder) -> dict[str, str]:
    facts = {} if results.config is None else _facts_of_config(results.config)
    if results.step is not None:
        others = f", of {len(results.steps)} evaluated steps" if len(results.steps) > 1 else ""
        facts["Step"] = f"{results.step:,}{others}"
    return facts | _facts_of_summary(results.folder / "summary.json")


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
