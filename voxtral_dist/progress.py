"""The progress display of long commands: a bar in a terminal, and a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from voxtral_dist.output.console import copy_line, one_line, printable

_SECONDS_BETWEEN_LINES = 15.0


def _shown(text: str) -> str:
    return one_line(printable(text))


class ProgressDisplay:
    """Shows how many items of a long command are done.

    Without a terminal it prints the first item, one line every 15 seconds, and the last item; with `prints_ends=False`,
    only one line every 15 seconds, and with `prints_lines=False` nothing.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        *,
        completed: int = 0,
        note: str = "",
        console: Console | None = None,
        transient: bool = False,
        redirects_output: bool = False,
        prints_ends: bool = True,
        prints_lines: bool = True,
    ) -> None:
        """Describe what is counted; nothing is shown before the display is entered.

        Args:
            what: the name of the command or of its items.
            total: the number of items; None where it is not known yet.
            completed: items that an earlier process has done.
            note: shown beside the bar before the first update.
            console: where to print; standard output by default.
            transient: whether the bar disappears at the end.
            redirects_output: whether what is printed to `sys.stdout` and `sys.stderr` appears above the bar, if it goes
                to a terminal too. Not for processes that fork: their children would inherit the redirection, and the
                lock inside it.
            prints_ends: whether the first and the last item are printed without a terminal. Without them, a command
                that takes less than 15 seconds prints nothing.
            prints_lines: whether anything is printed without a terminal.
        """
        what, note = _shown(what), _shown(note)
        self._what = what
        self._total = total
        self._console = console or Console()
        self._is_live = self._console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            # On a narrow terminal the note takes a second line. By default rich would leave the number out.
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[note]}", markup=False, table_column=Column()),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=transient,
            disable=not self._is_live,
            # What is piped to a file belongs there, not above a bar.
            redirect_stdout=redirects_output and sys.stdout.isatty(),
            redirect_stderr=redirects_output and sys.stderr.isatty(),
        )
        self._task = self._bar.add_task(what, total=total, completed=completed, note=note)
        self._prints_ends = prints_ends
        self._prints_lines = prints_lines
        self._printed_at = None if prints_ends else time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        """Print a line, above the bar where there is one."""
        shown = printable(line)
        self._console.print(shown, highlight=False, markup=False, soft_wrap=True)
        copy_line(shown)

    def show(
        self, num_done: int, note: str = "", *, total: int | None = None, seconds_left: float | None = None
    ) -> None:
        """Show how many items are done.

        Args:
            num_done: items done so far.
            note: shown after the number.
            total: the number of items, where it became known or changed.
            seconds_left: printed in lines where known; the bar has an estimate of its own.
        """
        self._total = self._total if total is None else total
        note = _shown(note)
        self._bar.update(self._task, completed=num_done, total=self._total, note=note)
        if not self._is_live and self._prints_lines and self._is_line_due(num_done):
            self._printed_at = time.monotonic()
            self.say(self._line(num_done, note, seconds_left))

    def _is_line_due(self, num_done: int) -> bool:
        if self._printed_at is None or (self._prints_ends and num_done == self._total):
            return True
        return time.monotonic() - self._printed_at >= _SECONDS_BETWEEN_LINES

    def _line(self, num_done: int, note: str, seconds_left: float | None) -> str:
        count = f"{num_done}" if self._total is None else f"{num_done}/{self._total}"
        left = "" if seconds_left is None else f"left {seconds_left / 60:.1f} min"
        return "  ".join(part for part in (f"{self._what} {count}", note, left) if part)


def progress_of_command(what: str, total: int | None, *, prints_lines: bool = True) -> ProgressDisplay:
    """A display on the error stream that disappears at the end: standard output is for results.

    Args:
        what: see `ProgressDisplay`.
        total: see `ProgressDisplay`.
        prints_lines: whether a line is printed every 15 seconds where there is no terminal.
    """
    return ProgressDisplay(
        what,
        total,
        console=Console(stderr=True),
        transient=True,
        redirects_output=True,
        prints_ends=False,
        prints_lines=prints_lines,
    )
