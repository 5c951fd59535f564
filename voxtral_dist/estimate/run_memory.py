"""The memory of a configured run: that of its sharding in every phase, by kind at its peak, and whether it fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from voxtral_dist.estimate.activations import MicroBatchShape
from voxtral_dist.estimate.checkpointing import ChosenCheckpointing
from voxtral_dist.estimate.estimator import Estimator, Machine, ShardingRow
from voxtral_dist.estimate.quantities import gigabytes
from voxtral_dist.estimate.sharding import Sharding
from voxtral_dist.estimate.state_bytes import checkpoint_bytes
from voxtral_dist.output.counting import counted


@dataclass(frozen=True)
class Decoding:
    """How evaluations decode.

    decoding_bytes: of a rank, besides weights. gathers_weights: see `MemoryEstimate`. source: how batches were found.
    """

    decoding_bytes: int
    gathers_weights: bool | None
    source: str

    @property
    def line(self) -> str:
        """The memory and the weights of evaluations."""
        weights = {True: "gathered on each rank", False: "sharded, all ranks in lockstep", None: "not sharded"}
        return (
            f"evaluation: weights {weights[self.gathers_weights]}; decoding needs {gigabytes(self.decoding_bytes)} "
            f"({self.source})"
        )


@dataclass(frozen=True)
class RunMemory:
    """The memory of a run as configured.

    shape: the micro-batch with the highest peak. source: how it was found. configured: the configured sharding.
    by_kind: its bytes by kind, on a rank's device and in a node's host memory, each at its own peak. phases,
    host_phases: its bytes on a rank's device, and in a node's host memory, in each phase. checkpoint_copy_bytes: of a
    node's host memory, which a checkpoint in the background takes beside those of phases; 0 if none is made. decoding:
    None without test sets. checkpointing: what `activation_checkpointing: auto` has become; None where it was not
    asked for.
    """

    machine: Machine
    shape: MicroBatchShape
    source: str
    configured: ShardingRow
    checkpointing: ChosenCheckpointing | None
    by_kind: dict[str, dict[str, float]]
    phases: dict[str, float]
    host_phases: dict[str, float]
    checkpoint_copy_bytes: float
    decoding: Decoding | None

    @classmethod
    def of(cls, estimator: Estimator, sharding: Sharding, checkpointing: ChosenCheckpointing | None) -> RunMemory:
        """The memory of an estimator's run, in which `auto` has been replaced."""
        ranks = estimator.machine.ranks_of_node
        shape, found = estimator.largest(sharding)
        host_peak = found.host_peak(ranks)
        return cls(
            machine=estimator.machine,
            shape=shape,
            source=estimator.workload.source,
            configured=estimator.row(found),
            checkpointing=checkpointing,
            by_kind={"device": dict(found.peak.device), "host": host_peak.host_kinds_of_node(ranks)},
            phases={phase.name: phase.device_bytes for phase in found.phases},
            host_phases={phase.name: phase.host_bytes_of_node(ranks) for phase in found.phases},
            checkpoint_copy_bytes=_checkpoint_copy_bytes(estimator, sharding),
            decoding=_decoding(estimator, found.gathers_weights),
        )

    def to_json(self) -> dict[str, Any]:
        """Everything in plain types; sizes in bytes."""
        tree = asdict(self)
        if self.checkpointing:
            tree["checkpointing"]["checkpointing"] = self.checkpointing.checkpointing.model_dump()
        return tree

    def lines(self) -> Iterator[str]:
        """The memory as text for a terminal, and whether the run fits."""
        shape, machine = self.shape, self.machine
        limit = "" if machine.gpu_memory is None else f" of {gigabytes(machine.gpu_memory)}"
        verdict = {True: ": it fits", False: ": IT DOES NOT FIT", None: ""}[self.configured.fits]
        label = "GPU" if machine.device == "gpu" else "rank"
        yield (
            f"{self.configured.name} on {counted(machine.num_gpus, label)}: "
            f"{gigabytes(self.configured.device_bytes)}{limit} per {label}{verdict}"
        )
        yield (
            f"  for a micro-batch of {counted(shape.num_examples, 'example')} and "
            f"{counted(shape.num_windows, 'window')}, padded to {counted(shape.num_positions, 'position')}: "
            f"{self.source}"
        )
        yield f"  peak, in the {self.configured.peak_at}:"
        for kind, num_bytes in self.by_kind["device"].items():
            if num_bytes:
                yield f"    {kind:<17}{gigabytes(num_bytes):>10}"
        yield "  all phases: " + ", ".join(f"{name} {gigabytes(size)}" for name, size in self.phases.items())
        if self.checkpointing:
            yield f"  {self.checkpointing.line}"
        if self.decoding:
            yield f"  {self.decoding.line}"
        if self.configured.host_bytes_of_node:
            yield from self._host_lines()
        if self.checkpoint_copy_bytes:
            yield (
                f"  a checkpoint in the background: {gigabytes(self.checkpoint_copy_bytes)} more of host memory per "
                "node, from the first one on (`checkpoint.asynchronous`)"
            )
        if machine.device == "gpu":
            yield "  These numbers follow from formulas (docs/planning.md) and are not yet measured on a GPU."

    def _host_lines(self) -> Iterator[str]:
        row = self.configured
        if self.machine.device == "cpu":
            yield f"  host memory per node: {gigabytes(row.host_bytes_of_node)}"
            return
        yield f"  host memory per node: {gigabytes(row.host_bytes_of_node)}; peak, in the {row.host_peak_at}:"
        for kind, num_bytes in self.by_kind["host"].items():
            if num_bytes:
                yield f"    {kind:<19}{gigabytes(num_bytes):>10}"
        yield "  all phases: " + ", ".join(f"{name} {gigabytes(size)}" for name, size in self.host_phases.items())


def _checkpoint_copy_bytes(estimator: Estimator, sharding: Sharding) -> float:
    config = estimator.config
    if config.checkpoint.asynchronous is False:
        return 0.0
    whole = checkpoint_bytes(estimator.model, config.optimizer, sharding)
    return whole * estimator.machine.ranks_of_node / estimator.machine.num_gpus


def _decoding(estimator: Estimator, gathers_weights: bool | None) -> Decoding | None:
    if not estimator.decoding_bytes:
        return None
    return Decoding(estimator.decoding_bytes, gathers_weights, estimator.workload.evaluation.source)
