"""Write `report.html` and `report.md` of a run or of a folder of results."""

from __future__ import annotations

from pathlib import Path

from voxtral_dist.errors import UserError, write_reason
from voxtral_dist.files import DISK_ERRORS, encodable, write_atomically, write_errors_named
from voxtral_dist.reporting.contents import read_contents
from voxtral_dist.reporting.html import render_html
from voxtral_dist.reporting.markdown import render_markdown
from voxtral_dist.reporting.results_folder import ReportOptions


def write_report(folder: Path, options: ReportOptions, out: Path | None = None) -> tuple[Path, Path]:
    """Write both files and return their paths.

    Args:
        folder: a run, or a folder of `NAME.json` and `NAME.jsonl`.
        options: what the report shows.
        out: folder of the files; None for `folder`.

    Raises:
        UserError: see `read_contents`, or the files cannot be written there.
        WriteError: the disk is full or read-only.
    """
    report = read_contents(folder, options)
    target = out or folder
    texts = {target / "report.html": render_html(report), target / "report.md": render_markdown(report)}
    try:
        with write_errors_named("The report", target, DISK_ERRORS):
            target.mkdir(parents=True, exist_ok=True)
            for path, text in texts.items():
                write_atomically(path, encodable(text))
    except OSError as error:
        raise UserError(f"The report cannot be written to {target}: {write_reason(error)}.") from error
    html, markdown = texts
    return html, markdown
