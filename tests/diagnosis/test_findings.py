"""What differs between hosts, and what is slow, is found and named; what is alike is not."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest

from voxtral_dist.diagnosis.facts import RankFacts
from voxtral_dist.diagnosis.findings import HostFindings, problems
from voxtral_dist.diagnosis.folders import Speed
from voxtral_dist.diagnosis.links import Link, rounds
from voxtral_dist.diagnosis.report import report_lines

VERSIONS = {"torch": "2.13.0", "Python": "3.11.2", "CUDA": "13.0"}


def _host(name: str, first_rank: int) -> HostFindings:
    ranks = tuple(
        RankFacts(rank, name, "NVIDIA H200, 140 GiB", "570.86.15", VERSIONS, 96, 64 * 10**9, ())
        for rank in (first_rank, first_rank + 1)
    )
    return HostFindings(ranks, 0.01, {"`run_dir`": Speed(2e9, 3e9), "shards": Speed(read=1e9)})


HOSTS = [_host("alpha", 0), _host("beta", 2), _host("gamma", 4)]
LINKS = [Link(pair, 30e-6, 40e9) for pair in combinations(range(3), 2)]


def _with_rank(host: HostFindings, **changes: object) -> HostFindings:
    return replace(host, ranks=tuple(replace(rank, **changes) for rank in host.ranks))


def test_hosts_that_are_alike_have_no_problem() -> None:
    assert problems(HOSTS, LINKS) == []
    assert next(report_lines(HOSTS, LINKS, [])) == "Nothing is wrong."


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (_with_rank(HOSTS[2], driver="535.1"), "driver 535.1, but 570.86.15 on most hosts"),
        (_with_rank(HOSTS[2], gpu="NVIDIA A100, 80 GiB"), "GPUs: NVIDIA A100, 80 GiB, but NVIDIA H200, 140 GiB on"),
        (_with_rank(HOSTS[2], versions=VERSIONS | {"torch": "2.12.0"}), "torch 2.12.0, but 2.13.0 on most hosts"),
        (_with_rank(HOSTS[2], problems=("GPU 1 has 40.0 GiB in use",)), "GPU 1 has 40.0 GiB in use"),
        (replace(HOSTS[2], ranks=HOSTS[2].ranks[:1]), "1 rank, but 2 on alpha"),
        (replace(HOSTS[2], seconds_ahead=-3.2), "its clock is 3.2 s behind alpha's"),
        (replace(HOSTS[2], speeds=HOSTS[2].speeds | {"`run_dir`": Speed(5e8, 3e9)}), "`run_dir` writes 500 MB/s, the"),
        (
            replace(HOSTS[2], speeds=HOSTS[2].speeds | {"shards": Speed(problem="the shards x cannot be read")}),
            "shards x",
        ),
    ],
)
def test_another_host_is_named_once_with_what_is_wrong_and_comes_first(other: HostFindings, sentence: str) -> None:
    hosts = [*HOSTS[:2], other]
    found = problems(hosts, LINKS)
    assert {problem.host for problem in found} == {"gamma"}
    assert sum(sentence in problem.sentence for problem in found) == 1
    lines = list(report_lines(hosts, LINKS, found))
    assert lines[0] == f"Wrong ({len(found)}):"
    table = [
        line.split()[0] for line in lines if line.split() and line.split()[0] in ("host", "alpha", "beta", "gamma")
    ]
    assert table[:4] == ["host", "gamma", "alpha", "beta"]


def test_the_slowest_pair_of_hosts_comes_first() -> None:
    links = [LINKS[0], replace(LINKS[1], latency_seconds=2e-3), replace(LINKS[2], bandwidth=1e9)]
    assert [problem.sentence for problem in problems(HOSTS, links)] == [
        "between beta and gamma 1.0 GB/s, the median of all pairs is 40.0 GB/s",
        "between alpha and gamma an all-reduce takes 2000 us, the median of all pairs is 30 us",
    ]


@pytest.mark.parametrize("num_hosts", range(1, 9))
def test_every_host_meets_every_other_once(num_hosts: int) -> None:
    all_rounds = rounds(num_hosts)
    assert sorted(pair for pairs in all_rounds for pair in pairs) == list(combinations(range(num_hosts), 2))
    for pairs in all_rounds:
        hosts = [host for pair in pairs for host in pair]
        assert len(hosts) == len(set(hosts))
