"""MLPs in chunks compute what whole ones do, and every part of a checkpointed block is computed again only once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from voxtral_dist.model.mlp_chunks import MlpChunks

WIDTH, NUM_BLOCKS = 8, 3
NUM_EXAMPLES, NUM_POSITIONS = 2, 15
NUM_CHUNKS = 3
Chunks = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


class Block(nn.Module):
    """Two halves that write down how often they are computed, and for how many positions."""

    def __init__(self, calls: list[str], dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Sequential(
            nn.Linear(WIDTH, 3 * WIDTH), nn.Tanh(), nn.Dropout(dropout), nn.Linear(3 * WIDTH, WIDTH)
        )
        self.calls = calls

    def attention(self, states: Tensor) -> Tensor:
        """The first half."""
        self.calls.append("attention")
        return states + self.first(states).tanh()

    def mlp(self, states: Tensor) -> Tensor:
        """The second half, of single positions."""
        self.calls.append(f"mlp of {states.numel() // WIDTH}")
        moved: Tensor = self.second(states)
        return states + moved

    def forward(self, states: Tensor, chunks: Chunks | None) -> Tensor:
        """Both halves."""
        states = self.attention(states)
        return chunks(self.mlp, states) if chunks else self.mlp(states)


def gradients(blocks: nn.ModuleList, chunks: Chunks | None, is_checkpointed: bool) -> list[Tensor]:
    """Gradients of the input and of all weights."""
    torch.manual_seed(1)
    given = torch.randn(NUM_EXAMPLES, NUM_POSITIONS, WIDTH, requires_grad=True)
    states = given * 1
    for block in blocks:
        call = partial(checkpoint, block, use_reentrant=False) if is_checkpointed else block
        states = call(states, chunks)
    blocks[0].calls.clear()
    blocks.zero_grad()
    states.square().sum().backward()  # type: ignore[no-untyped-call]
    found = [given, *blocks.parameters()]
    return [one.grad for one in found if one.grad is not None]


def blocks_of(calls: list[str], dropout: float = 0.0) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Block(calls, dropout) for _ in range(NUM_BLOCKS))


@pytest.mark.parametrize("is_checkpointed", [False, True])
# The last has more chunks than positions.
@pytest.mark.parametrize(("tokens", "agreed"), [(30, None), (7, None), (1, None), (30, 4), (7, 40)])
def test_chunks_change_no_gradient(tokens: int, agreed: int | None, is_checkpointed: bool) -> None:
    blocks = blocks_of([])
    expected = gradients(blocks, None, is_checkpointed=False)
    chunks = MlpChunks(tokens)
    chunks.num_chunks = agreed
    for found, gradient in zip(gradients(blocks, chunks, is_checkpointed), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-4)


def test_the_backward_pass_computes_each_chunk_and_each_first_half_once() -> None:
    calls: list[str] = []
    gradients(blocks_of(calls), MlpChunks(10), is_checkpointed=True)
    assert calls == ["attention", *["mlp of 10"] * 3] * NUM_BLOCKS
    gradients(blocks_of(calls), MlpChunks(10), is_checkpointed=False)
    assert calls == ["mlp of 10"] * 3 * NUM_BLOCKS


def kept_chunks(function: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
    """The same chunks, of which nothing is computed again."""
    parts = states.flatten(0, 1).tensor_split(NUM_CHUNKS)
    return torch.cat([function(part) for part in parts]).view_as(states)


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_chunk_is_computed_again_with_the_same_dropout(is_checkpointed: bool) -> None:
    blocks = blocks_of([], dropout=0.5)
    expected = gradients(blocks, kept_chunks, is_checkpointed=False)
    chunks = MlpChunks(-(-NUM_EXAMPLES * NUM_POSITIONS // NUM_CHUNKS))
    for found, gradient in zip(gradients(blocks, chunks, is_checkpointed), expected, strict=True):
        assert torch.equal(found, gradient)


def test_an_mlp_behind_nothing_trained_is_computed_again_from_its_own_input() -> None:
    blocks = blocks_of([])
    torch.manual_seed(2)
    given = torch.randn(NUM_EXAMPLES, NUM_POSITIONS, WIDTH)
    mlp = blocks[0].mlp
    results = []
    for chunks in (None, MlpChunks(10)):
        blocks.zero_grad()
        made = chunks(mlp, given) if chunks else mlp(given)
        made.square().sum().backward()
        results.append([one.grad.clone() for one in blocks[0].second.parameters()])
    for found, gradient in zip(*results, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-4)
