"""What training needs of an engine, whichever library shards the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from voxtral_dist.data.examples.micro_batch import MicroBatch


@dataclass(frozen=True)
class StepUpdate:
    """What one optimizer update did.

    is_skipped: gradients overflowed in float16, so nothing was updated and the loss is scaled less from now on.
    """

    grad_norm: float
    learning_rate: float
    is_skipped: bool = False


@dataclass(frozen=True)
class ParameterState:
    """One parameter with what the optimizer knows of it: float32, full shape, on the CPU.

    moments: the optimizer's running means by their names in torch, such as AdamW's `exp_avg` and `exp_avg_sq`.
    """

    name: str
    weight: Tensor
    moments: dict[str, Tensor]


class Engine(Protocol):
    """A sharded model and its optimizer. Implemented by `engine.zero.ZeroEngine` and `engine.fsdp2.Fsdp2Engine`."""

    def backward(self, batch: MicroBatch, num_target_tokens: int, *, is_last: bool) -> Tensor:
        """Accumulate the gradient of one micro-batch; the loss summed over its targets on this rank, detached.

        Args:
            batch: on any device.
            num_target_tokens: targets of the whole step over all ranks, so that each of them weighs the same.
            is_last: whether no micro-batch of this step follows.
        """

    def step(self, learning_rate: float) -> StepUpdate:
        """Clip, update the weights, and forget the gradients."""

    def full_weights(self) -> AbstractContextManager[nn.Module]:
        """A whole model in evaluation mode with the current weights: every rank can generate on its own."""

    def full_weights_bytes(self) -> int:
        """What `full_weights` takes of a device besides what it holds already; 0 where weights are not sharded."""

    def sharded_weights(self) -> AbstractContextManager[nn.Module]:
        """The model as it is sharded, in evaluation mode: all ranks must call it equally often, in lockstep."""

    def parameter_states(self) -> Iterator[ParameterState]:
        """Every trained parameter in a fixed order. All ranks must go through it together; each gets full tensors."""

    def load_parameter_states(self, states: Iterator[ParameterState], num_updates: int) -> None:
        """Take over weights and moments, in the order of `parameter_states`, after `num_updates` updates."""

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The full shape of each trained parameter, in the order of `parameter_states`, without communication."""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter, frozen ones too, as in `parameter_states`: what an exported model is made of."""

    def parameter_table(self) -> list[str]:
        """Lines that say which parameters are trained: see `trainable.parameter_table`."""

    def scalars(self) -> dict[str, float]:
        """What else the next update depends on, such as the scale of a float16 loss; the same on all ranks."""

    def load_scalars(self, scalars: dict[str, float]) -> None:
        """Take over what `scalars` gave."""


@runtime_checkable
class ShardFiles(Protocol):
    """What an engine has besides, if its ranks can write their shards side by side. Implemented by `Fsdp2Engine`."""

    def save_shards(self, folder: Path) -> None:
        """Write what `parameter_states` gives, so that `shard_files` reads it; all ranks call it together."""

    def load_shards(self, folder: Path, num_updates: int) -> None:
        """Take over what `save_shards` wrote on any number of ranks, after `num_updates` updates."""
