"""A rank takes its GPU before it joins the others, and exchanges numbers on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from voxtral_dist.distributed import collectives
from voxtral_dist.distributed.world import World, joined_world

from fake_cuda import CUDA, CudaTensor, fake_cuda, values

RANK_OF_TWO = World(rank=0, size=2, local_rank=0, device=CUDA)


def test_the_gpu_is_chosen_before_nccl_starts_and_is_bound_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("set_device", device)))
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **named: calls.append((backend, named["device_id"]))
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append(("synchronize", device)))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append(("destroy", None)))
    with joined_world() as world:
        assert world.device == CUDA
    # What is in flight is finished before the group goes.
    assert calls == [("set_device", CUDA), ("nccl", CUDA), ("synchronize", CUDA), ("destroy", None)]


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two ranks with equal values, and a backend that takes tensors on the device alone, as NCCL does."""

    def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        assert isinstance(tensor, CudaTensor)
        if op == dist.ReduceOp.SUM:
            values(tensor).mul_(2)

    def broadcast(objects: list[Any], src: int, device: torch.device) -> None:
        assert device == CUDA

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    with fake_cuda():
        yield


@pytest.mark.usefixtures("twins")
def test_ranks_exchange_numbers_on_their_devices() -> None:
    assert collectives.sum_over_ranks([0.25, 3.0], RANK_OF_TWO) == [0.5, 6.0]
    assert collectives.max_over_ranks([3, 1], RANK_OF_TWO) == [3, 1]
    assert collectives.from_first_rank("a value", RANK_OF_TWO) == "a value"
    collectives.wait_for_all(RANK_OF_TWO)
    collectives.sum_tensor_over_ranks(total := torch.ones(2, device=CUDA), RANK_OF_TWO)
    assert values(total).tolist() == [2.0, 2.0]
