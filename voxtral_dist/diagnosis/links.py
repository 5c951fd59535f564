"""Latency and bandwidth of collectives on each host alone, between each pair of hosts, and over all ranks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from voxtral_dist.distributed.collectives import gather_on_first, wait_for_all
from voxtral_dist.distributed.world import World

# Beyond this, each host is measured with some of the others: a round takes a second or two.
MOST_ROUNDS = 31
_NUM_SMALL, _NUM_LARGE = 20, 5


@dataclass(frozen=True)
class Link:
    """Collectives among the ranks of some hosts.

    Attributes:
        hosts: positions of the hosts: one, two, or all.
        latency_seconds: of an all-reduce of one number, the median.
        bandwidth: bytes a second that each rank receives in an all-gather, the median.
    """

    hosts: tuple[int, ...]
    latency_seconds: float
    bandwidth: float


def measure_links(hosts: Sequence[Sequence[int]], num_bytes: int, world: World) -> list[Link]:
    """Measure on rank 0's word; all ranks call it together.

    Args:
        hosts: the ranks of each host.
        num_bytes: what each rank contributes to an all-gather.
        world: all ranks.

    Returns:
        On rank 0: each host alone that has several ranks, then pairs, then all; elsewhere an empty list.
    """
    own = next(position for position, ranks in enumerate(hosts) if world.rank in ranks)
    found = [_measured((own,), hosts, num_bytes, world)]
    for pairs in rounds(len(hosts))[:MOST_ROUNDS]:
        # Pairs of a round share no host, so they are measured together.
        wait_for_all(world)
        mine = next((pair for pair in pairs if own in pair), None)
        found.append(_measured(mine, hosts, num_bytes, world) if mine else None)
    wait_for_all(world)
    found.append(_measured(tuple(range(len(hosts))), hosts, num_bytes, world) if len(hosts) > 2 else None)
    gathered = gather_on_first(found, world)
    links = [link for of_rank in gathered for link in of_rank if link is not None]
    return sorted(links, key=lambda link: (len(link.hosts), link.hosts))


def rounds(num_hosts: int) -> list[list[tuple[int, int]]]:
    """Rounds in which each host meets at most one other, and after all of which it has met every one.

    The circle method of tournaments: one stays, the others move on by one place.
    """
    places = [*range(num_hosts)] + [-1] * (num_hosts % 2)
    found = []
    for _ in range(len(places) - 1):
        half = len(places) // 2
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in pairs if min(a, b) >= 0])
        places = [places[0], places[-1], *places[1:-1]]
    return found


def _measured(positions: tuple[int, ...], hosts: Sequence[Sequence[int]], num_bytes: int, world: World) -> Link | None:
    """What the first rank of these hosts measures, and None on the others."""
    ranks = [rank for position in positions for rank in hosts[position]]
    if len(ranks) == 1:
        return None
    group = dist.new_group(ranks, timeout=world.timeout, use_local_synchronization=True)
    small = torch.zeros(1, device=world.device)
    mine = torch.zeros(max(1, num_bytes // 4), device=world.device)
    gathered = torch.empty(len(ranks) * len(mine), device=world.device)
    latency = _median(lambda: dist.all_reduce(small, group=group), _NUM_SMALL, world.device)
    seconds = _median(lambda: dist.all_gather_into_tensor(gathered, mine, group=group), _NUM_LARGE, world.device)
    dist.destroy_process_group(group)
    if world.rank != ranks[0]:
        return None
    return Link(positions, latency, (len(ranks) - 1) * 4 * len(mine) / seconds)


def _median(operation: Callable[[], object], num_times: int, device: torch.device) -> float:
    """Seconds of an operation; the first time, which connects, does not count."""
    measured = []
    for _ in range(num_times + 1):
        started = time.perf_counter()
        operation()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        measured.append(time.perf_counter() - started)
    return statistics.median(measured[1:])
