"""Parts of a model in the order of its forward pass, and the peak of a forward or backward pass through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Part:
    """One part of the model, such as a block.

    Bytes:
        kept: from its forward pass to its backward pass.
        again: recomputed by a checkpoint just before its backward pass.
        working: gradients of activations at the widest place of its backward pass, beyond what is kept.
        passing: temporary in its forward pass.
        leaving: temporary at the end of its backward pass, with the gradient of its input.
        offloaded: from its forward pass to its backward pass in host memory.

    Numbers of values of parameters:
        num_trained, num_frozen: of all.
        num_widest: trained ones whose gradients exist at the widest place of its backward pass.
        num_gathered: of the largest group of its parameters that an engine gathers together; None for all of them.
        largest: of the largest trained parameter.
    """

    name: str
    kept: float
    again: float = 0.0
    working: float = 0.0
    passing: float = 0.0
    leaving: float = 0.0
    offloaded: float = 0.0
    num_trained: int = 0
    num_frozen: int = 0
    num_widest: int = 0
    num_gathered: int | None = None
    largest: int = 0

    @property
    def num_values(self) -> int:
        """Values of all its parameters."""
        return self.num_trained + self.num_frozen

    @property
    def is_reached(self) -> bool:
        """Whether the backward pass visits it."""
        return bool(self.kept or self.offloaded or self.num_trained)


def size_in_values(parameter: nn.Parameter, value_bytes: int) -> int:
    """Values of a parameter; a quantized one counts as the values in the model's precision that take its bytes."""
    return parameter.numel() if parameter.is_floating_point() else -(-parameter.numel() // value_bytes)


def forward_peak(parts: Sequence[Part]) -> float:
    """The most bytes that a forward pass holds at any time."""
    most = before = 0.0
    for part in parts:
        most = max(most, before + part.kept + part.passing)
        before += part.kept
    return most


def backward_peak(parts: Sequence[Part], gradient_bytes: float = 0.0) -> float:
    """The most bytes that a backward pass holds: from the last part to the first, it frees what each one kept.

    Within a part, activations go and gradients come at nearly even rates, so the most is held at its widest place or at
    its end.

    Args:
        parts: in the order of the forward pass.
        gradient_bytes: bytes of each trained parameter's gradient, which stay.
    """
    most, left, before = 0.0, 0.0, sum(part.kept for part in parts)
    for part in reversed(parts):
        most = max(most, before + part.again + part.working + left + part.num_widest * gradient_bytes)
        before -= part.kept
        left += part.num_trained * gradient_bytes
        most = max(most, before + left + part.leaving)
    return most


def plain_part(
    name: str,
    modules: Sequence[nn.Module],
    kept: float,
    working: float = 0.0,
    passing: float = 0.0,
    leaving: float = 0.0,
    num_widest: int = 0,
) -> Part:
    """A part of some modules that is never checkpointed; numbers of values are those of its parameters, see `Part`."""
    sizes = [one.numel() for module in modules for one in module.parameters() if one.requires_grad]
    frozen = sum(one.numel() for module in modules for one in module.parameters()) - sum(sizes)
    if not (sizes or kept):
        working = leaving = 0.0
    return Part(
        name,
        kept,
        working=working,
        passing=passing,
        leaving=leaving,
        num_trained=sum(sizes),
        num_frozen=frozen,
        num_widest=num_widest,
        largest=max(sizes, default=0),
    )


def block_part(
    name: str,
    block: nn.Module,
    reached: bool,
    checkpointed: bool,
    kept: float,
    boundary: float,
    working: float,
    passing: float,
    value_bytes: int,
    is_offloaded: bool = False,
) -> Part:
    """A transformer block.

    Its backward pass is widest in the feed-forward layers, when the gradient of the last matrix, a largest one, exists.

    Args:
        name: of the part.
        block: whose parameters may be trained.
        reached: whether the backward pass reaches it.
        checkpointed: whether it keeps only its input, of `boundary` bytes, and recomputes the rest.
        kept: bytes that it keeps, or recomputes.
        boundary: bytes of its input.
        working: see `Part`.
        passing: see `Part`.
        value_bytes: of a value in the model's precision.
        is_offloaded: whether a checkpointed block's input is in host memory between forward and backward pass. It is on
            the device too while the block is computed, and in the backward pass so is that of the block before it.
    """
    sizes = [one.numel() for one in block.parameters() if one.requires_grad]
    frozen = sum(size_in_values(one, value_bytes) for one in block.parameters()) - sum(sizes)
    trained, largest = sum(sizes), max(sizes, default=0)
    if not reached:
        return Part(name, 0.0, passing=passing, num_trained=trained, num_frozen=frozen, largest=largest)
    offloaded = boundary if checkpointed and is_offloaded else 0.0
    return Part(
        name,
        boundary - offloaded if checkpointed else kept,
        again=kept + 2 * offloaded if checkpointed else 0.0,
        working=working,
        passing=passing + offloaded if checkpointed else 0.0,
        leaving=boundary + offloaded,
        offloaded=offloaded,
        num_trained=trained,
        num_frozen=frozen,
        num_widest=largest,
        largest=largest,
    )
