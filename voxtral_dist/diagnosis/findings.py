"""What is wrong, from facts and measurements of all hosts."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from voxtral_dist.diagnosis.facts import RankFacts
from voxtral_dist.diagnosis.folders import Speed
from voxtral_dist.diagnosis.links import Link
from voxtral_dist.output.counting import counted

# Times in logs and in messages about lost hosts are each host's own, and certificates of buckets have times too.
_MOST_SECONDS_AHEAD = 1.0
# Of the median of all hosts or links. A ring is as slow as its slowest link, a save as its slowest host.
_LEAST_FRACTION = 0.5
_MOST_TIMES_LATENCY = 4.0
# Differences of latency below this do not matter, and vary.
_LEAST_LATENCY_SECONDS = 200e-6


@dataclass(frozen=True)
class HostFindings:
    """What was found on one host.

    Attributes:
        ranks: the facts of its ranks.
        seconds_ahead: its clock's difference from rank 0's host.
        speeds: of folders and shards, by name.
    """

    ranks: tuple[RankFacts, ...]
    seconds_ahead: float
    speeds: dict[str, Speed]

    @property
    def name(self) -> str:
        """The name of the host."""
        return self.ranks[0].host


@dataclass(frozen=True)
class Problem:
    """A sentence about what is wrong, and the host that it is about; None where it is about several."""

    host: str | None
    sentence: str


def problems(hosts: Sequence[HostFindings], links: Sequence[Link]) -> list[Problem]:
    """Everything that is wrong: hosts in their order, then links, the slowest first."""
    found = [problem for host in hosts for problem in _of_host(host, hosts)]
    return [*found, *_of_links(hosts, links)]


def _of_host(host: HostFindings, hosts: Sequence[HostFindings]) -> Iterator[Problem]:
    # Ranks of a host mostly tell the same.
    for sentence in dict.fromkeys(sentence for rank in host.ranks for sentence in rank.problems):
        yield Problem(host.name, sentence)
    if len(host.ranks) != len(hosts[0].ranks):
        yield Problem(host.name, f"{counted(len(host.ranks), 'rank')}, but {len(hosts[0].ranks)} on {hosts[0].name}")
    yield from (Problem(host.name, sentence) for sentence in _unlike_most(host, hosts))
    if abs(host.seconds_ahead) > _MOST_SECONDS_AHEAD:
        yield Problem(
            host.name,
            f"its clock is {abs(host.seconds_ahead):.1f} s {'ahead of' if host.seconds_ahead > 0 else 'behind'} "
            f"{hosts[0].name}'s: let NTP or chrony set it",
        )
    for name, speed in host.speeds.items():
        if speed.problem is not None:
            yield Problem(host.name, speed.problem)
        for kind in ("write", "read"):
            own = getattr(speed, kind)
            others = [getattr(one.speeds[name], kind) for one in hosts if name in one.speeds]
            median = statistics.median([value for value in others if value is not None] or [0.0])
            if own is not None and own < _LEAST_FRACTION * median:
                yield Problem(host.name, f"{name} {kind}s {rate(own)}, the median of all hosts is {rate(median)}")


def _unlike_most(host: HostFindings, hosts: Sequence[HostFindings]) -> Iterator[str]:
    """Versions, drivers and GPUs that are others than on most hosts, or than on the first of equally many."""
    everywhere = [_described(one) for one in hosts]
    for name, value in _described(host).items():
        usual, _ = Counter(described[name] for described in everywhere if name in described).most_common(1)[0]
        if value != usual:
            yield f"{name} {value}, but {usual} on most hosts"


def _described(host: HostFindings) -> dict[str, str]:
    first = host.ranks[0]
    gpus = ", ".join(sorted({rank.gpu for rank in host.ranks}))
    return {"GPUs:": gpus, "driver": str(first.driver), **first.versions}


def _of_links(hosts: Sequence[HostFindings], links: Sequence[Link]) -> Iterator[Problem]:
    pairs = [link for link in links if len(link.hosts) == 2]
    if len(pairs) < 2:
        return
    bandwidth = statistics.median(link.bandwidth for link in pairs)
    latency = statistics.median(link.latency_seconds for link in pairs)
    for link in sorted(pairs, key=lambda link: link.bandwidth):
        named = f"between {' and '.join(hosts[position].name for position in link.hosts)}"
        if link.bandwidth < _LEAST_FRACTION * bandwidth:
            yield Problem(None, f"{named} {rate(link.bandwidth)}, the median of all pairs is {rate(bandwidth)}")
        if link.latency_seconds > max(_MOST_TIMES_LATENCY * latency, latency + _LEAST_LATENCY_SECONDS):
            yield Problem(
                None,
                f"{named} an all-reduce takes {link.latency_seconds * 1e6:.0f} us, the median of all pairs is "
                f"{latency * 1e6:.0f} us",
            )


def rate(bytes_per_second: float) -> str:
    """Bytes a second for people."""
    return f"{bytes_per_second / 1e6:.0f} MB/s" if bytes_per_second < 1e9 else f"{bytes_per_second / 1e9:.1f} GB/s"
