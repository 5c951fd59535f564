"""The protocol between training and the library that shards the model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from voxtral_dist.data.examples.micro_batch import MicroBatch


@dataclass(frozen=True)
class StepUpdate:
    """The outcome of one optimizer update.

    grad_norm: global L2 norm of the gradients before clipping. is_skipped: gradients overflowed in float16, so the
    update was skipped and the loss scale lowered. Updates that the caller refused, or whose norm is not finite for
    another reason, are skipped too, and known by that.
    """

    grad_norm: float
    learning_rate: float
    is_skipped: bool = False


@dataclass(frozen=True)
class ParameterState:
    """One parameter with its optimizer state: full float32 tensors on the CPU.

    moments: the optimizer's running means by their names in torch, such as AdamW's `exp_avg` and `exp_avg_sq`. average:
    the weight's moving average; None where the run has none.
    """

    name: str
    weight: Tensor
    moments: dict[str, Tensor]
    average: Tensor | None = None


# A key of the tensor, and the full tensor on the device of the engine.
CopyTensor = Callable[[Hashable, Tensor], Tensor]


def on_cpu(_key: Hashable, tensor: Tensor) -> Tensor:
    """The tensor itself if it is on the CPU, otherwise a copy."""
    return tensor.cpu()


def always(_grad_norm: float) -> bool:
    """Accept every update."""
    return True


class Engine(Protocol):
    """A sharded model and its optimizer. Implemented by `ZeroEngine` and `Fsdp2Engine`.

    All ranks must call its methods together, unless a method says otherwise.
    """

    def backward(self, batch: MicroBatch, num_target_tokens: int, *, is_last: bool) -> Tensor:
        """Accumulate the gradient of one micro-batch of this rank.

        Args:
            batch: the micro-batch, on any device.
            num_target_tokens: targets in the whole step over all ranks; the loss is divided by it, so that every target
                has the same weight.
            is_last: whether this is the last micro-batch of the step.

        Returns:
            The loss summed over the targets of the micro-batch, detached.
        """

    def step(self, learning_rate: float, accepts: Callable[[float], bool] = always) -> StepUpdate:
        """Clip the gradients, update the weights, and zero the gradients.

        Args:
            learning_rate: of this update.
            accepts: whether to make an update with this norm of the gradient, the same on all ranks. It is called
                when the host has waited for the norm, and not for one that is not finite. Without the update, weights
                and the optimizer's states are as they were, and checkpoints count it among the skipped ones.
        """

    def full_weights(self) -> AbstractContextManager[nn.Module]:
        """The full model in evaluation mode with the current weights: each rank can generate on its own."""

    def full_weights_bytes(self) -> int:
        """Device memory that `full_weights` needs in addition, in bytes; 0 if weights are not sharded."""

    def sharded_weights(self) -> AbstractContextManager[nn.Module]:
        """The sharded model in evaluation mode: all ranks must run it equally often, in lockstep."""

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Moving averages in the place of the trained weights, for every method that returns weights, until it exits.

        Does nothing without `optimizer.ema_decay`.
        """

    def parameter_states(self, copy: CopyTensor = on_cpu) -> Iterator[ParameterState]:
        """The trained parameters that this rank writes into a checkpoint: every W-th of W ranks.

        All ranks must iterate together and to the end. Only the rank that writes a parameter has it in full, until the
        next one. So that a device holds one full tensor at a time, each is passed to `copy` as soon as it is complete.

        Args:
            copy: returns a tensor's copy on the CPU, given a key of its own, too. The default copies nothing that is on
                the CPU already, and may share memory with the engine's own.
        """

    def load_parameter_states(self, states: Iterator[ParameterState], num_updates: int) -> None:
        """Load weights and moments of all trained parameters, as they were after `num_updates` updates.

        They come in the order of `parameter_shapes`. Averages that were not stored start from the weights.
        """

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The full shape of each trained parameter in the model's order; without communication."""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights of an export: every parameter, including frozen ones, in full and float32 on the CPU of rank 0.

        All ranks must iterate together and to the end; ranks other than 0 get nothing, and copy nothing to their CPU.
        """

    def not_finite(self) -> list[str]:
        """Names of the parameters of which this rank holds a value that is not finite; without communication."""

    def parameter_table(self) -> list[str]:
        """Lines of a table of trained parameters; see `trainable.parameter_table`."""

    def scalars(self) -> dict[str, float]:
        """Other state of the next update, such as the loss scale of float16; the same on all ranks."""

    def load_scalars(self, scalars: dict[str, float]) -> None:
        """Load what `scalars` returned, possibly on another engine."""


@runtime_checkable
class DistributedCheckpointing(Protocol):
    """Methods of an engine whose ranks can write their own partitions. Implemented by `Fsdp2Engine`.

    They are written by `dcp_writing.PlannedPartitions`.
    """

    def partitions(self) -> dict[str, Tensor]:
        """Sharded weights and moments by their names on disk, which share memory with the engine's own."""

    def load_partitions(self, folder: Path, num_updates: int) -> None:
        """Load the partitions that were written on any number of ranks, as it was after `num_updates` updates."""
