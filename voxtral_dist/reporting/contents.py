"""The contents of a report: read once, then written as HTML and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from voxtral_dist.errors import UserError
from voxtral_dist.reporting.charts import Chart, draw
from voxtral_dist.reporting.curves import Results, curves_of
from voxtral_dist.reporting.flags import flags_of_run
from voxtral_dist.reporting.outcomes import summary_of
from voxtral_dist.reporting.results_folder import ReportOptions, ResultsFolder, read_results, read_results_folder
from voxtral_dist.reporting.run_facts import read_summary, run_facts
from voxtral_dist.reporting.test_set_section import SectionReader, TestSetSection


@dataclass(frozen=True)
class ReportContents:
    """The contents of a report.

    verdicts: sentences about all test sets. flags: what is wrong with the run as a whole. facts: of the run, by name.
    results: of all evaluated steps. baseline: its path. notes: what is not shown, and why.
    """

    title: str
    verdicts: tuple[str, ...]
    flags: tuple[str, ...]
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
    test_sets = tuple(reader.read(name) for name in folder.test_sets)
    summary = read_summary(folder.path / "summary.json")
    return ReportContents(
        title=folder.name,
        verdicts=tuple(_verdicts(test_sets)),
        flags=tuple(flags_of_run(summary, folder, results)),
        facts=run_facts(folder, summary),
        charts=tuple(draw(curve) for curve in curves_of(folder.rows, results)),
        results=results,
        test_sets=test_sets,
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


def _verdicts(test_sets: Sequence[TestSetSection]) -> Iterator[str]:
    """A sentence for each earlier result that test sets were compared with."""
    outcomes = [outcome for one in test_sets for outcome in one.outcomes]
    for against in dict.fromkeys(outcome.against for outcome in outcomes):
        yield summary_of([outcome for outcome in outcomes if outcome.against == against])
