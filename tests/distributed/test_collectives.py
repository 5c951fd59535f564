"""Sums that wait for hours."""

import socket
import time
from dataclasses import replace
from datetime import timedelta
from typing import NoReturn

import pytest
import torch.distributed as dist

from voxtral_dist.distributed import collectives
from voxtral_dist.distributed.collectives import PatientSum, computed_on_first
from voxtral_dist.distributed.world import World, alone, set_timeouts
from voxtral_dist.errors import LostPeerError

from ranks import run_ranks


def _sum_late(world: World, seconds: list[float]) -> list[int]:
    def refused(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a group of gloo takes the address of the host's name, which others may not reach")

    dist.new_group = refused
    socket.gethostname = refused
    first, second = PatientSum(world), PatientSum(world)
    time.sleep(seconds[world.rank])
    return [first(10 + world.rank), second(-5 + world.rank)]


@pytest.mark.parametrize("seconds", [[0.0, 2.0, 0.5], [2.0, 0.0, 0.0]])
def test_a_patient_sum_needs_no_group_of_its_own(seconds):
    assert run_ranks(3, _sum_late, seconds) == 3 * [[33, -12]]


def _computed_late(world: World) -> tuple[int, list[str]]:
    """A value of rank 0 that takes longer than a collective may; and what is said meanwhile."""
    world = replace(world, timeout=timedelta(seconds=1))
    collectives._SILENT_SECONDS = 0.5
    set_timeouts(world.timeout)
    said: list[str] = []
    collectives.log.warning = lambda message, *values: said.append(message % values)  # type: ignore[method-assign]

    def compute() -> int:
        time.sleep(2.5)
        return 7

    return computed_on_first(compute, world), said


def test_a_long_computation_of_rank_0_holds_no_collective_open():
    first, second, third = run_ranks(3, _computed_late)
    assert (first[0], second[0], third[0]) == (7, 7, 7)
    assert first[1] == third[1] == [], "one of the ranks that wait says it"
    assert second[1][0].startswith("Waiting for the ranks [0] (1 of 3) since ")


def _wait_for_a_rank_that_is_gone(world: World) -> str | None:
    arrive = PatientSum(replace(world, timeout=timedelta(seconds=1)))
    if world.rank == 1:
        # As a process that has ended, it gives no more signs of life.
        arrive._arrived.set()
        time.sleep(4)
        return None
    with pytest.raises(LostPeerError) as refused:
        arrive(0)
    return str(refused.value)


def test_a_rank_that_is_gone_is_not_waited_for():
    sentences = run_ranks(3, _wait_for_a_rank_that_is_gone)
    assert sentences[0] == sentences[2]
    assert "Nothing was heard of the ranks [1] (1 of 3) for 1 s" in sentences[0]


def test_a_patient_sum_of_one_rank_is_its_value():
    assert PatientSum(alone("cpu"))(3) == 3
