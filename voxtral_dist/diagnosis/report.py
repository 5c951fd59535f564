"""The report on hosts: what is wrong first, then a table by host, then the links."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from voxtral_dist.diagnosis.findings import HostFindings, Problem, rate
from voxtral_dist.diagnosis.folders import Speed
from voxtral_dist.diagnosis.links import Link
from voxtral_dist.output.counting import counted

# The slowest ones; a table of all pairs of 64 hosts has 2,016 rows.
_MOST_PAIRS = 16


def report_lines(hosts: Sequence[HostFindings], links: Sequence[Link], problems: Sequence[Problem]) -> Iterator[str]:
    """The lines of the report."""
    if problems:
        yield f"Wrong ({len(problems)}):"
        yield from (f"  {problem.host + ': ' if problem.host else ''}{problem.sentence}" for problem in problems)
    else:
        yield "Nothing is wrong."
    yield ""
    troubled = {problem.host for problem in problems}
    ordered = sorted(hosts, key=lambda host: host.name not in troubled)
    yield from _table(_HEADINGS + list(_folders(hosts)), [_host_row(host, hosts) for host in ordered])
    if links:
        yield ""
        yield from _table(["ranks of", "all-reduce, us", "all-gather"], _link_rows(hosts, links))


_HEADINGS = ["host", "ranks", "GPU", "driver", "torch", "clock, ms", "/dev/shm, GB"]


def _folders(hosts: Sequence[HostFindings]) -> list[str]:
    names = dict.fromkeys(name for host in hosts for name in host.speeds)
    return [f"{name}, write / read" for name in names]


def _host_row(host: HostFindings, hosts: Sequence[HostFindings]) -> list[str]:
    first = host.ranks[0]
    names = dict.fromkeys(name for one in hosts for name in one.speeds)
    speeds = []
    for name in names:
        speed = host.speeds.get(name, Speed())
        speeds.append(f"{_rate_or_none(speed.write)} / {_rate_or_none(speed.read)}")
    return [
        host.name,
        str(len(host.ranks)),
        first.gpu,
        first.driver or "-",
        first.versions.get("torch", "-"),
        f"{1000 * host.seconds_ahead:+.1f}",
        f"{first.shared_memory_bytes / 1e9:.1f}",
        *speeds,
    ]


def _rate_or_none(bytes_per_second: float | None) -> str:
    return "-" if bytes_per_second is None else rate(bytes_per_second)


def _link_rows(hosts: Sequence[HostFindings], links: Sequence[Link]) -> Iterator[list[str]]:
    pairs = sorted((link for link in links if len(link.hosts) == 2), key=lambda link: link.bandwidth)
    others = [link for link in links if len(link.hosts) != 2]
    for link in [*pairs[:_MOST_PAIRS], *others]:
        is_all = len(link.hosts) == len(hosts) > 2
        named = "all hosts" if is_all else ", ".join(hosts[position].name for position in link.hosts)
        yield [named, f"{link.latency_seconds * 1e6:.0f}", rate(link.bandwidth)]
    if len(pairs) > _MOST_PAIRS:
        yield [f"... {counted(len(pairs) - _MOST_PAIRS, 'faster pair')}", "", ""]


def _table(headings: Sequence[str], rows: Iterator[list[str]] | Sequence[list[str]]) -> Iterator[str]:
    cells = [list(headings), *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headings))]
    for row in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
