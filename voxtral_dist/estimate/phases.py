"""The phases of a run in which a rank's memory may peak, what they depend on, and what each holds.

    P parameters, of which P_t are trained   W ranks that share one copy   s bytes of a value in the model's precision

Model states follow Rajbhandari et al. (arXiv 1910.02054): s P of weights, 4 P_t of gradients, and 12 P_t of float32
weights and Adam's two moments; each is divided by W from its ZeRO stage on. Buffers of DeepSpeed 0.19.8 and of torch's
FSDP2 follow from their code (`zero_memory`, `fsdp2_memory`). Temporary tensors and libraries differ between GPUs and
CPU processes.

Host memory of offloaded states follows from what DeepSpeed and FSDP2 pin (`zero_host_memory`, `fsdp2_memory`).

Not counted: fragmentation of torch's allocator on GPUs, micro-batches in host memory, and the page cache of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from voxtral_dist.config import OptimizerConfig
from voxtral_dist.engine.optim import parameter_groups
from voxtral_dist.estimate.parts import size_in_values
from voxtral_dist.estimate.sharding import Sharding
from voxtral_dist.estimate.state_bytes import StateBytes
from voxtral_dist.evaluation.decoding_weights import gathers_weights
from voxtral_dist.exports.tensor_files import MAX_FILE_BYTES
from voxtral_dist.model.blocks import blocks_of
from voxtral_dist.model.voxtral import TrainedVoxtral

DeviceKind = Literal["gpu", "cpu"]

FLOAT32_BYTES = 4
MASTER_BYTES = 4
# Contexts of CUDA, NCCL and cuBLAS; not yet measured on a GPU.
_GPU_LIBRARY_BYTES = 2 * 10**9
# A run exports the model in the layouts of transformers and of Mistral.
_NUM_LAYOUTS = 2
# Host memory of a process that uses a GPU: Python, libraries and CUDA's own; not yet measured on a GPU.
_GPU_PROCESS_BYTES = 4 * 10**9
# Host memory of a data worker that it does not share with the process that it was forked from: 20 MB were measured with
# short utterances; the rest is for longer ones that it reads ahead.
_WORKER_BYTES = 200 * 10**6
# What DeepSpeed, autograd and oneDNN load and allocate after the start: measured with a model of 0.3 M parameters.
_CPU_LIBRARY_BYTES = 97 * 10**6


@dataclass(frozen=True)
class ModelSizes:
    """Numbers of values of a model's parameters; quantized ones count as the values that take as many bytes.

    trained, frozen: sums. largest, largest_trained: the largest parameter, and the largest trained one. largest_unit:
    the largest group of parameters that FSDP2 gathers together. sizes, are_trained: each parameter. groups: each
    trained parameter by group of the optimizer.
    """

    trained: int
    frozen: int
    largest: int
    largest_trained: int
    largest_unit: int
    sizes: tuple[int, ...]
    are_trained: tuple[bool, ...]
    groups: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, model: TrainedVoxtral, optimizer: OptimizerConfig) -> ModelSizes:
        """The sizes of a model, which may be on the meta device."""

        def size(parameter: nn.Parameter) -> int:
            return size_in_values(parameter, model.lm_head.weight.element_size())

        parameters = list(model.parameters())
        trained = [size(one) for one in parameters if one.requires_grad]
        sizes = tuple(map(size, parameters))
        blocks = [block for of_component in blocks_of(model).values() for block in of_component]
        units = [sum(map(size, block.parameters())) for block in blocks]
        largest_unit = max([*units, model.lm_head.weight.numel()])
        return cls(
            trained=sum(trained),
            frozen=sum(sizes) - sum(trained),
            largest=max(sizes),
            largest_trained=max(trained),
            largest_unit=largest_unit,
            sizes=sizes,
            are_trained=tuple(one.requires_grad for one in parameters),
            groups=tuple(tuple(one.numel() for one in group["params"]) for group in parameter_groups(model, optimizer)),
        )

    @property
    def all(self) -> int:
        """Values of trained and frozen parameters."""
        return self.trained + self.frozen

    def persistent(self, threshold: int) -> int:
        """Values of the parameters that ZeRO-3 does not shard, because they are no larger than a threshold."""
        return sum(size for size in self.sizes if size <= threshold)


@dataclass(frozen=True)
class Phase:
    """Bytes of a rank in one phase of a run by kind, on its device and in its part of host memory.

    host_of_first: bytes by kind that only the first rank holds in addition, in host memory.
    """

    name: str
    device: Mapping[str, float]
    host: Mapping[str, float]
    host_of_first: Mapping[str, float] = field(default_factory=dict)

    @property
    def device_bytes(self) -> float:
        """All bytes on the device."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> float:
        """All bytes in host memory, without `host_of_first`."""
        return sum(self.host.values())

    def host_bytes_of_node(self, num_ranks: int) -> float:
        """Bytes in the host memory of the node with the first rank, which has `num_ranks` ranks."""
        return sum(self.host_kinds_of_node(num_ranks).values())

    def host_kinds_of_node(self, num_ranks: int) -> dict[str, float]:
        """The bytes of `host_bytes_of_node` by kind."""
        return {kind: size * num_ranks for kind, size in self.host.items()} | dict(self.host_of_first)

    @property
    def process_bytes(self) -> float:
        """Bytes of a process on a CPU, where the device is the host."""
        return self.device_bytes + self.host_bytes


@dataclass(frozen=True)
class MemoryEstimate:
    """The phases of a run under one sharding.

    nvme_bytes: a rank's part of the drive. gathers_weights: whether evaluations gather a copy of the weights on each
    rank; None if there is none to gather, or no evaluation.
    """

    sharding: Sharding
    phases: tuple[Phase, ...]
    nvme_bytes: float
    gathers_weights: bool | None = None

    @property
    def peak(self) -> Phase:
        """The phase with most bytes on the device."""
        return max(self.phases, key=lambda phase: phase.device_bytes)

    @property
    def device_bytes(self) -> float:
        """A rank's peak on its device."""
        return self.peak.device_bytes

    def host_peak(self, num_ranks: int) -> Phase:
        """The phase with most bytes in the host memory of a node with this many ranks."""
        return max(self.phases, key=lambda phase: phase.host_bytes_of_node(num_ranks))

    @property
    def process_bytes(self) -> float:
        """The peak of a process on a CPU, where the device is the host."""
        return max(phase.process_bytes for phase in self.phases)


@dataclass(frozen=True)
class Setting:
    """What memory depends on besides the model and its sharding.

    num_ranks: on all nodes. num_micro_batches: that a rank computes per step. value_bytes: of a value in the model's
    precision. num_workers: data workers of a rank. trained: bytes of a trained value's states. decoding_bytes: that
    decoding needs besides weights, see `DecodingMemory`; 0 without evaluations. evaluation_weights:
    `evaluation.weights`. rank_memory: of a GPU, or of a process on a CPU; None if unknown.
    """

    device: DeviceKind
    num_ranks: int
    num_micro_batches: int
    value_bytes: int
    num_workers: int = 0
    trained: StateBytes = field(default_factory=StateBytes)
    decoding_bytes: int = 0
    evaluation_weights: Literal["auto", "gathered", "sharded"] = "auto"
    rank_memory: float | None = None

    @property
    def library_bytes(self) -> float:
        """Bytes of a rank's libraries."""
        return _CPU_LIBRARY_BYTES if self.device == "cpu" else _GPU_LIBRARY_BYTES

    @property
    def process_host_bytes(self) -> float:
        """Host memory of a rank that uses a GPU, without what is offloaded."""
        return _GPU_PROCESS_BYTES + self.num_workers * _WORKER_BYTES

    def export(self, held: Phase, sizes: ModelSizes) -> Phase:
        """The phase of the export: the first rank collects a file of each layout, and holds one float32 weight.

        Args:
            held: what a rank holds in every phase.
            sizes: of the model.
        """
        file_bytes = min(sizes.all * self.value_bytes, max(MAX_FILE_BYTES, sizes.largest * self.value_bytes))
        files = {"exported files": _NUM_LAYOUTS * file_bytes + sizes.largest * FLOAT32_BYTES}
        return Phase("export", held.device, held.host, files)

    def evaluation(self, held: Phase, copy_bytes: float, unit_bytes: float) -> tuple[Phase, bool | None]:
        """The phase of an evaluation, and `MemoryEstimate.gathers_weights`.

        Args:
            held: what a rank holds in every phase.
            copy_bytes: of a full copy of the weights, 0 if they are not sharded.
            unit_bytes: of the weights that a forward pass gathers at a time.
        """
        gathers = None
        if copy_bytes:
            in_use = held.process_bytes if self.device == "cpu" else held.device_bytes
            free = None if self.rank_memory is None else self.rank_memory - in_use
            gathers = gathers_weights(self.evaluation_weights, copy_bytes + self.decoding_bytes, free)
        more = {"gathered weights": copy_bytes if gathers else unit_bytes, "decoding": self.decoding_bytes}
        return Phase(held.name, {**held.device, **more}, held.host), gathers
