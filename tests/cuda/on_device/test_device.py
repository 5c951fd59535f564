"""The device itself: values are right, mixtures of devices are refused, and each wait is recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fake_cuda import CUDA, CudaTensor, fake_cuda, log, values


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    with fake_cuda() as made:
        yield made


def on_device(*shape: int) -> Tensor:
    return torch.ones(shape, device=CUDA)


def test_gradients_are_on_the_device_and_equal_the_cpus() -> None:
    weights = {"cpu": torch.randn(5, 7, requires_grad=True)}
    weights["cuda"] = weights["cpu"].detach().pin_memory().to(CUDA, non_blocking=True).requires_grad_()
    for weight in weights.values():
        (weight @ torch.ones((7, 3), device=weight.device)).tanh().sum().backward()  # type: ignore[no-untyped-call]
    gradient, expected = weights["cuda"].grad, weights["cpu"].grad
    assert isinstance(gradient, CudaTensor)
    assert gradient.device == CUDA
    assert expected is not None
    assert torch.equal(gradient.real, expected)
    assert not log.waits


MIXTURES: dict[str, Callable[[], object]] = {
    "sum": lambda: on_device(3) + torch.ones(3),
    "product": lambda: torch.ones(2, 3) @ on_device(3, 4),
    "list": lambda: torch.cat([on_device(3), torch.ones(3)]),
    "indices": lambda: on_device(3).index_select(0, torch.tensor([1])),
    "in place": lambda: torch.ones(3).add_(on_device(3)),
    "layer": lambda: torch.nn.Linear(3, 3)(on_device(2, 3)),
}


@pytest.mark.parametrize("mix", MIXTURES.values(), ids=MIXTURES.keys())
def test_a_mixture_of_devices_is_refused(mix: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        mix()


WAITS: dict[str, Callable[[], object]] = {
    "item": lambda: on_device(1).item(),
    "if": lambda: bool(on_device(1) > 0),
    "tolist": lambda: on_device(3).tolist(),
    "nonzero": lambda: on_device(3).nonzero(),
    "mask": lambda: on_device(3)[on_device(3) > 0],
    "assignment by a mask": lambda: on_device(3).index_put_([on_device(3) > 0], on_device(1)),
    "where": lambda: torch.where(on_device(3) > 0),
    "unique": lambda: torch.unique(on_device(3)),
    "equal": lambda: torch.equal(on_device(3), on_device(3)),
    "repetition": lambda: on_device(3).repeat_interleave(on_device(3).long()),
    "made of a list": lambda: torch.tensor([1, 2], device=CUDA),
    "indices on the CPU": lambda: on_device(3)[torch.tensor([0, 1])],
    "copy to the device": lambda: torch.ones(3).pin_memory().to(CUDA),
    "copy from pageable memory": lambda: torch.ones(3).to(CUDA, non_blocking=True),
    "copy to the host": lambda: on_device(3).cpu(),
    "copy into a tensor": lambda: on_device(3).copy_(torch.ones(3)),
    "copy into pageable memory": lambda: torch.ones(3).copy_(on_device(3), non_blocking=True),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS.keys())
def test_a_wait_is_recorded(wait: Callable[[], object]) -> None:
    wait()
    assert log.waits.total() == 1, log.waits


def copied_to_host(tensor: Tensor) -> Tensor:
    """The tensor itself, after a copy of it was queued."""
    torch.empty(tensor.shape, pin_memory=True).copy_(tensor, non_blocking=True)
    return tensor


NO_WAITS: dict[str, Callable[[], object]] = {
    "copy from pinned memory": lambda: torch.ones(3).pin_memory().to(CUDA, non_blocking=True),
    "a part of pinned memory": lambda: torch.ones(9).pin_memory()[2:5].to(CUDA, non_blocking=True),
    "masked fill": lambda: on_device(3).masked_fill(on_device(3) > 0, 2.0),
    "selection": lambda: torch.where(on_device(3) > 0, on_device(3), 0.0),
    "copy into pinned memory": lambda: copied_to_host(on_device(3)),
    "indices on the device": lambda: on_device(3)[torch.arange(2, device=CUDA)],
    "a number": lambda: on_device(3) * torch.tensor(2.0),
    "repetition of known length": lambda: on_device(3).repeat_interleave(4),
}


@pytest.mark.parametrize("work", NO_WAITS.values(), ids=NO_WAITS.keys())
def test_work_without_a_wait_records_none(work: Callable[[], object]) -> None:
    made = work()
    assert isinstance(made, CudaTensor)
    assert values(made).device.type == "cpu"
    assert not log.waits
