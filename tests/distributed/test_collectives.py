"""Sums that wait for hours."""

import socket
import time
from typing import NoReturn

import pytest
import torch.distributed as dist

from voxtral_dist.distributed.collectives import PatientSum
from voxtral_dist.distributed.world import World, alone

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


def test_a_patient_sum_of_one_rank_is_its_value():
    assert PatientSum(alone("cpu"))(3) == 3
