"""Offloaded activations come back as they were, in time, and take few pages of host memory."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from voxtral_dist.model import activation_offloading
from voxtral_dist.model.activation_offloading import ActivationOffloading, HostMemory

NUM_BLOCKS, WIDTH = 6, 8
PAGE_BYTES = 256


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_offloading, "_PAGE_BYTES", PAGE_BYTES)


class LateHostMemory(HostMemory):
    """A stream that copies as late as it may: when somebody waits for a copy, or for a later one."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.queue: list[list[tuple[Tensor, Tensor]]] = []
        self.num_done = 0

    def copy(self, pairs: list[tuple[Tensor, Tensor]]) -> Any:
        for target, _ in pairs:
            # As floating point numbers, these bytes are no number.
            target.fill_(255)
        self.queue.append(pairs)
        return self.num_done + len(self.queue)

    def wait(self, copied: Any) -> None:
        while self.num_done < copied:
            for target, source in self.queue.pop(0):
                target.copy_(source)
            self.num_done += 1


class Blocks(nn.Module):
    """Blocks that keep only their inputs, which are offloaded if there is a context for it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(NUM_BLOCKS))
        self.inputs: list[weakref.ref[Tensor]] = []

    def forward(self, states: Tensor, offloading: ActivationOffloading | None) -> Tensor:
        """The result for `(N, WIDTH)` states."""
        self.inputs = []
        for layer in self.layers:
            self.inputs.append(weakref.ref(states))
            if offloading is None:
                states = layer(states)
            else:
                with offloading.saving():
                    states = checkpoint(layer, states, use_reentrant=False)
        return states


def gradients_of(blocks: Blocks, *losses: Tensor) -> list[Tensor]:
    blocks.zero_grad()
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
    return [one.grad.clone() for one in blocks.parameters() if one.grad is not None]


def states(num_rows: int) -> Tensor:
    return torch.randn((num_rows, WIDTH), generator=torch.Generator().manual_seed(num_rows)).requires_grad_()


@pytest.fixture(params=[HostMemory, LateHostMemory])
def offloading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ActivationOffloading:
    monkeypatch.setattr(activation_offloading, "HostMemory", request.param)
    return ActivationOffloading()


def num_pages(offloading: ActivationOffloading) -> int:
    """Pages that are free, which are all when nothing is offloaded."""
    (host,) = offloading._hosts.values()
    return len(host._free)


def test_gradients_are_the_same_to_the_last_digit_at_any_length(offloading: ActivationOffloading) -> None:
    blocks = Blocks()
    for num_rows in (40, 3, 65, 8, 1):
        expected = gradients_of(blocks, blocks(states(num_rows), None).square().sum())
        found = gradients_of(blocks, blocks(states(num_rows), offloading).square().sum())
        for gradient, other in zip(found, expected, strict=True):
            assert torch.equal(gradient, other)
    gc.collect()
    # As many as the longest input needs, and no more after shorter ones.
    assert num_pages(offloading) == NUM_BLOCKS * -(-65 * WIDTH * 4 // PAGE_BYTES)


def test_several_forward_passes_may_come_before_their_backward_passes(offloading: ActivationOffloading) -> None:
    blocks = Blocks()
    expected = gradients_of(blocks, *(blocks(states(count), None).square().sum() for count in (5, 30)))
    found = gradients_of(blocks, *[blocks(states(count), offloading).square().sum() for count in (5, 30)])
    for gradient, other in zip(found, expected, strict=True):
        assert torch.equal(gradient, other)


def test_a_graph_that_is_kept_can_be_used_again(offloading: ActivationOffloading) -> None:
    blocks = Blocks()
    loss = blocks(states(9), offloading).square().sum()
    (first,) = torch.autograd.grad(loss, [blocks.layers[0][0].weight], retain_graph=True)
    (again,) = torch.autograd.grad(loss, [blocks.layers[0][0].weight])
    assert torch.equal(first, again)
    assert float(first.abs().max()) > 0


def test_only_the_last_input_stays_on_the_device(offloading: ActivationOffloading) -> None:
    blocks = Blocks()
    given = states(9)
    made = blocks(given * 1, offloading)
    assert made.requires_grad
    assert not any(reference() is not None for reference in blocks.inputs)
    offloaded = [one for one in gc.get_objects() if type(one) is activation_offloading._Offloaded]
    on_device = [one for one in offloaded if one._on_device is not None]
    assert len(offloaded) == NUM_BLOCKS
    assert on_device == list(offloading._leaving)
    assert len(on_device) == 1


def test_a_loss_that_is_never_used_gives_its_pages_back(offloading: ActivationOffloading) -> None:
    blocks, pages_of_input = Blocks(), -(-9 * WIDTH * 4 // PAGE_BYTES)
    for _ in range(3):
        made = blocks(states(9), offloading)
        del made
    # The last input keeps its pages until its copy is waited for, in the next pass.
    assert num_pages(offloading) == (NUM_BLOCKS - 1) * pages_of_input


def test_a_copy_that_nobody_waits_for_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Careless(LateHostMemory):
        def wait(self, copied: Any) -> None:
            pass

    monkeypatch.setattr(activation_offloading, "HostMemory", Careless)
    blocks = Blocks()
    expected = gradients_of(blocks, blocks(states(9), None).square().sum())
    found = gradients_of(blocks, blocks(states(9), ActivationOffloading()).square().sum())
    assert not torch.equal(found[0], expected[0])
