"""A display of progress on the error stream."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 30.0


class ProgressDisplay(Protocol):
    """Shows progress."""

    def __call__(self, num_done: int, note: str) -> None:
        """Show how many are done, and a note."""


@contextmanager
def show_progress(what: str, total: int | None) -> Iterator[ProgressDisplay]:
    """A bar on a terminal, elsewhere a line now and then; both on the error stream."""
    if not sys.stderr.isatty():
        yield _Lines(what, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(what, total=total, note="")
        yield lambda num_done, note: bar.update(task, completed=num_done, note=note)


@dataclass
class _Lines:
    """Says now and then how far a command is."""

    what: str
    total: int | None
    printed_at: float = 0.0

    def __post_init__(self) -> None:
        self.printed_at = time.monotonic()

    def __call__(self, num_done: int, note: str) -> None:
        if time.monotonic() - self.printed_at >= _SECONDS_BETWEEN_LINES:
            self.printed_at = time.monotonic()
            of_total = f" of {self.total}" if self.total is not None else ""
            print(f"{self.what}: {num_done}{of_total} {note}".rstrip(), file=sys.stderr, flush=True)
