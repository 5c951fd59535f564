"""The contents of a report: read once, then written as HTML and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxtral_dist.config import RunConfig
from voxtral_dist.errors import UserError
from voxtral_dist.output.counting import counted
from voxtral_dist.reporting.charts import Chart, draw
from voxtral_dist.reporting.curves import Results, curves_of
from voxtral_dist.reporting.results_folder import ReportOptions, ResultsFolder, read_results, read_results_folder
from voxtral_dist.reporting.test_set_section import SectionReader, TestSetSection
from voxtral_dist.text.json_text import parse_json


@dataclass(frozen=True)
class ReportContents:
    """The contents of a report.

    facts: of the run, by name. results: of all evaluated steps. baseline: its path. notes: what is not shown, and why.
    """

    title: str
    facts: Mapping[str, str]
    charts: tuple[Chart, ...]
    results: Results
    test_sets: tuple[TestSetSection, ...]
    baseline: str | None
    notes: tuple[str, ...]


def read_contents(path: Path, options: ReportOptions) -> ReportContents:
    """Read what the report of a run, or of a folder of results, shows.

    Raises:
        UserError: there are no results, a file is damaged, or a baseline or shards in the options do not fit.
    """
    folder = read_results_folder(path, options.step)
    _refuse_unknown_sets(folder, options.shards)
    baseline = read_results_folder(options.baseline) if options.baseline else None
    shared = _shared_sets(folder, baseline)
    results = read_results(folder)
    reader = SectionReader(folder, options, baseline, shared)
    return ReportContents(
        title=folder.name,
        facts=_facts(folder),
        charts=tuple(draw(curve) for curve in curves_of(folder.rows, results)),
        results=results,
        test_sets=tuple(reader.read(name) for name in folder.test_sets),
        baseline=str(options.baseline) if options.baseline else None,
        notes=tuple(_notes(folder, baseline, shared)),
    )


def _refuse_unknown_sets(folder: ResultsFolder, shards: Mapping[str, str]) -> None:
    unknown = [name for name in shards if name not in folder.test_sets]
    if unknown:
        known = ", ".join(folder.test_sets) or "none"
        raise UserError(f"`--shards`: there are no results of a test set `{unknown[0]}`; known test sets: {known}.")


def _shared_sets(folder: ResultsFolder, baseline: ResultsFolder | None) -> list[str]:
    if baseline is None:
        return []
    shared = [name for name in folder.test_sets if name in baseline.test_sets]
    if not shared:
        raise UserError(
            f"`--baseline`: {baseline.path} has no test set of {folder.path} "
            f"({', '.join(folder.test_sets) or 'none'}), only {', '.join(baseline.test_sets) or 'none'}."
        )
    return shared


def _notes(folder: ResultsFolder, baseline: ResultsFolder | None, shared: Sequence[str]) -> list[str]:
    notes = []
    if folder.config_error is not None:
        notes.append(f"The configuration of the run cannot be used: {folder.config_error}")
    if baseline is not None and (missing := [name for name in folder.test_sets if name not in shared]):
        notes.append(f"The baseline has no results of {', '.join(missing)}.")
    if not folder.test_sets:
        notes.append("The run has not evaluated any test set.")
    return notes


def _facts(folder: ResultsFolder) -> dict[str, str]:
    facts = {} if folder.config is None else _facts_of_config(folder.config)
    if folder.step is not None:
        others = f", of {counted(len(folder.steps), 'evaluated step')}" if len(folder.steps) > 1 else ""
        facts["Step"] = f"{folder.step:,}{others}"
    return facts | _facts_of_summary(folder.path / "summary.json")


def _facts_of_config(config: RunConfig) -> dict[str, str]:
    return {
        "Model": config.model.path,
        "Precision": config.model.precision,
        "Length of the run": config.length,
    }


def _facts_of_summary(path: Path) -> dict[str, str]:
    """Facts that only a finished run has."""
    summary: Any = None
    if path.is_file():
        try:
            summary = parse_json(path.read_bytes())
        except ValueError:
            return {}
    if not isinstance(summary, dict):
        return {}
    shown = {"engine": "Engine", "world_size": "Ranks", "train_seconds": "Seconds of training"}
    return {name: str(summary[key]) for key, name in shown.items() if key in summary}
