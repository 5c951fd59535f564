"""Parts of a model in the order of its forward pass, and the peak of a forward or backward pass through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Part:
    """One part of the model, such as a block; all sizes are bytes but for the last two.

    kept: from its forward pass to its backward pass. again: recomputed by a checkpoint just before its backward pass.
    working: gradients of activations at the widest place of its backward pass, beyond what is kept. passing: temporary
    in its forward pass. num_trained: trained values. largest: those of the largest trained parameter.
    """

    name: str
    kept: float
    again: float = 0.0
    working: float = 0.0
    passing: float = 0.0
    num_trained: int = 0
    largest: int = 0


def forward_peak(parts: Sequence[Part]) -> float:
    """The most bytes that a forward pass holds at any time."""
    most = before = 0.0
    for part in parts:
        most = max(most, before + part.kept + part.passing)
        before += part.kept
    return most


def backward_peak(parts: Sequence[Part], gradient_bytes: float = 0.0) -> float:
    """The most bytes that a backward pass holds: from the last part to the first, it frees what each one kept.

    Args:
        parts: in the order of the forward pass.
        gradient_bytes: bytes of each trained parameter's gradient, which stay.
    """
    most, left, before = 0.0, 0.0, sum(part.kept for part in parts)
    for part in reversed(parts):
        most = max(most, before + part.again + part.working + left)
        before -= part.kept
        left += part.num_trained * gradient_bytes
        most = max(most, before + left)
    return most


def plain_part(
    name: str, modules: Sequence[nn.Module], kept: float, working: float = 0.0, passing: float = 0.0
) -> Part:
    """A part of some modules that is never checkpointed."""
    sizes = [one.numel() for module in modules for one in module.parameters() if one.requires_grad]
    working = working if sizes or kept else 0.0
    return Part(name, kept, 0.0, working, passing, sum(sizes), max(sizes, default=0))


def block_part(
    name: str,
    block: nn.Module,
    reached: bool,
    checkpointed: bool,
    kept: float,
    boundary: float,
    working: float,
    passing: float,
) -> Part:
    """A transformer block.

    Args:
        name: of the part.
        block: whose parameters may be trained.
        reached: whether the backward pass reaches it.
        checkpointed: whether it keeps only its input, of `boundary` bytes, and recomputes the rest.
        kept: bytes that it keeps, or recomputes.
        boundary: bytes of its input.
        working: see `Part`.
        passing: see `Part`.
    """
    sizes = [one.numel() for one in block.parameters() if one.requires_grad]
    trained, largest = sum(sizes), max(sizes, default=0)
    if not reached:
        return Part(name, 0.0, 0.0, 0.0, passing, trained, largest)
    if checkpointed:
        return Part(name, boundary, kept, working, passing, trained, largest)
    return Part(name, kept, 0.0, working, 0.0, trained, largest)
