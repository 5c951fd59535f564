"""Tables of what shard sets hold, by their indexes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from voxtral_dist.output.console import one_line, printable, say
from voxtral_dist.output.counting import counted
from voxtral_dist.shards.summary import DURATION_EDGES_SECONDS, RATE_EDGES, SetSummary, histogram_lines, hours


def print_summaries(summaries: Mapping[str, SetSummary]) -> None:
    """Print a table of all sets, then languages and histograms of each."""
    console = table_console()
    console.print(_sets_table(summaries))
    for folder, summary in summaries.items():
        say(f"{folder}: {counted(summary.num_utterances, 'utterance')}, {hours(summary.duration_seconds)}")
        console.print(_languages_table(summary))
        say("\n".join(_histograms(summary)))


def _sets_table(summaries: Mapping[str, SetSummary]) -> Table:
    table = Table(Column("set", overflow="fold"), box=SIMPLE_HEAD)
    for name in ("shards", "utterances", "hours", "MB", "text tokens", "longest", "shortest"):
        table.add_column(name, justify="right", no_wrap=True)
    for folder, of in summaries.items():
        sizes = (of.num_shards, of.num_utterances, f"{of.duration_seconds / 3600:.2f}", f"{of.num_bytes / 1e6:.1f}")
        ends = (f"{of.longest[1]:.2f} s (#{of.longest[0]})", f"{of.shortest[1]:.2f} s (#{of.shortest[0]})")
        table.add_row(Text(one_line(printable(folder))), *map(str, (*sizes, of.num_text_tokens, *ends)))
    return table


def _languages_table(summary: SetSummary) -> Table:
    table = Table("language", box=SIMPLE_HEAD)
    for name in ("utterances", "hours", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    for language, of in summary.by_size():
        share = of.duration_seconds / summary.duration_seconds if summary.duration_seconds else 0.0
        table.add_row(
            Text(one_line(printable(language))),
            str(of.num_utterances),
            f"{of.duration_seconds / 3600:.2f}",
            f"{100 * share:.1f} %",
        )
    return table


def _histograms(summary: SetSummary) -> Iterator[str]:
    yield "duration in seconds:"
    yield from histogram_lines(DURATION_EDGES_SECONDS, summary.duration_counts)
    yield "characters per second:"
    yield from histogram_lines(RATE_EDGES, summary.rate_counts)


def table_console() -> Console:
    """A console for tables on standard output."""
    # Without a terminal, wide enough that no name is cut.
    return Console() if sys.stdout.isatty() else Console(width=200)
