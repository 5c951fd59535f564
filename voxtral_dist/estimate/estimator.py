"""The memory of one configuration on one machine under any sharding, and the costs of its run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace

from voxtral_dist.config import ActivationCheckpointingConfig, ModelConfig, RunConfig, TrainableConfig
from voxtral_dist.estimate.activations import Activations, MicroBatchShape
from voxtral_dist.estimate.fsdp2_memory import Fsdp2Memory
from voxtral_dist.estimate.gpus import Gpu
from voxtral_dist.estimate.parts import Part
from voxtral_dist.estimate.phases import DeviceKind, MemoryEstimate, ModelSizes, Setting
from voxtral_dist.estimate.sharding import STANDARD_SHARDINGS, Fsdp2Sharding, Sharding, ZeroSharding
from voxtral_dist.estimate.state_bytes import StateBytes, state_bytes
from voxtral_dist.estimate.workload import WindowSizes, Workload, find_workload
from voxtral_dist.estimate.zero_memory import ZeroMemory
from voxtral_dist.evaluation.decoding_memory import DecodingMemory
from voxtral_dist.model.flops import TrainingFlops
from voxtral_dist.model.published import voxtral_config_for_estimates
from voxtral_dist.model.voxtral import (
    DTYPES,
    TrainedVoxtral,
    audio_tokens_per_window,
    build_trained_model,
    window_seconds,
)


@dataclass(frozen=True)
class Machine:
    """The machine that a run is estimated for; memory in bytes, None if unknown.

    num_gpus: ranks on all nodes. device: `gpu`, or `cpu` for ranks that are processes of a CPU. gpu_memory: of a GPU or
    such a process. host_memory: of a node. gpu: None if it is not named; then there is no roofline. mfu: fraction of
    `peak_tflops` that training was seen to reach; None takes the roofline's. peak_tflops: 10^12 operations per second
    of one device; None takes the named GPU's.
    """

    num_gpus: int = 1
    gpus_per_node: int = 8
    device: DeviceKind = "gpu"
    gpu_memory: int | None = None
    host_memory: int | None = None
    gpu: Gpu | None = None
    mfu: float | None = None
    peak_tflops: float | None = None

    @property
    def ranks_of_node(self) -> int:
        """Ranks on a full node."""
        return min(self.num_gpus, self.gpus_per_node)

    @property
    def memory_of_rank(self) -> float | None:
        """Bytes of a GPU, or of a process on a CPU, whose ranks share the memory of a node; None if unknown."""
        limits = [self.gpu_memory]
        if self.device == "cpu" and self.host_memory is not None:
            limits.append(self.host_memory // self.ranks_of_node)
        return min((limit for limit in limits if limit is not None), default=None)


@dataclass(frozen=True)
class ShardingRow:
    """Memory of one sharding: bytes of a GPU at its peak, of a node's host memory and of a node's drive.

    peak_at, host_peak_at: the phase of a GPU's peak, and of the host's. fits: None without limits.
    """

    name: str
    peak_at: str
    device_bytes: float
    host_bytes_of_node: float
    host_peak_at: str
    nvme_bytes_of_node: float
    fits: bool | None


@dataclass(frozen=True)
class Costs:
    """Floating point operations and time of all steps, from formulas (`voxtral_dist.model.flops`).

    num_steps: None where `num_epochs` is set and shards are missing; then the costs are those of one step.
    model_flops: needed by the mathematics, without padding and recomputation; the numerator of an MFU. hardware_flops:
    computed by the devices. idle: fraction of the ranks' time that is unused because `slots_per_step` is not a multiple
    of their number. mfu: as given, or by the roofline; see `is_roofline`. seconds: without evaluations and checkpoints.
    Without a known rate, mfu, peak_tflops and seconds are None.
    """

    num_steps: int | None
    micro_batches_per_rank: int
    model_flops: float
    hardware_flops: float
    idle: float
    mfu: float | None
    peak_tflops: float | None
    is_roofline: bool
    seconds: float | None


def estimate_memory(sharding: Sharding, sizes: ModelSizes, parts: Sequence[Part], setting: Setting) -> MemoryEstimate:
    """The memory of the rank that has most."""
    if isinstance(sharding, Fsdp2Sharding):
        found = Fsdp2Memory(sharding, sizes, parts, setting).estimate()
    else:
        found = ZeroMemory(sharding, sizes, parts, setting).estimate()
    return _with_offloaded(found, sum(part.offloaded for part in parts))


def _with_offloaded(found: MemoryEstimate, num_bytes: float) -> MemoryEstimate:
    """An estimate with the host memory of offloaded activations, which stays allocated from the first step on."""
    if not num_bytes:
        return found
    phases = (
        phase if phase.name == "building" else replace(phase, host={**phase.host, "activations": num_bytes})
        for phase in found.phases
    )
    return replace(found, phases=tuple(phases))


class Estimator:
    """Estimates for one configuration on one machine.

    window_sizes: of the model. decoding_bytes: that decoding needs on a rank besides weights; 0 without test sets.
    """

    def __init__(
        self,
        config: RunConfig,
        machine: Machine,
        workload: Workload | Callable[[RunConfig, WindowSizes], Workload] = find_workload,
    ) -> None:
        """Build the model without weights; `workload` may be a function that finds it."""
        self.config = config
        self.machine = machine
        self.model = meta_model_of(config.model, config.trainable)
        self._flops: dict[ActivationCheckpointingConfig, TrainingFlops] = {}
        self.flops = self._flops_with(config)
        self._state_bytes: dict[Sharding, StateBytes] = {}
        self._sizes = ModelSizes.of(self.model, config.optimizer)
        self._activations = Activations(self.model, config.model)
        self.window_sizes = window_sizes(self.model, config.model)
        self.workload = workload if isinstance(workload, Workload) else workload(config, self.window_sizes)
        self.decoding_bytes = self._decoding_bytes()

    def with_config(self, config: RunConfig) -> Estimator:
        """Estimates of the same model and workload, with another `model.activation_checkpointing`."""
        other = copy(self)
        other.config = config
        other.flops = self._flops_with(config)
        other._activations = self._activations.with_config(config.model)
        return other

    def with_machine(self, machine: Machine) -> Estimator:
        """Estimates of the same run on another machine."""
        other = copy(self)
        other.machine = machine
        return other

    def with_workload(self, config: RunConfig, workload: Workload) -> Estimator:
        """Estimates of the same model, with other sizes of micro-batches and decoded batches."""
        other = self.with_config(config)
        other.workload = workload
        other.decoding_bytes = other._decoding_bytes()
        return other

    def largest(self, sharding: Sharding) -> tuple[MicroBatchShape, MemoryEstimate]:
        """The candidate of the workload that needs most memory, and this memory."""
        found = ((shape, self.estimate(sharding, shape)) for shape in self.workload.candidates)
        return max(found, key=lambda pair: pair[1].device_bytes)

    def estimate(self, sharding: Sharding, shape: MicroBatchShape) -> MemoryEstimate:
        """The memory of the rank that has most."""
        setting = Setting(
            device=self.machine.device,
            num_ranks=self.machine.num_gpus,
            num_micro_batches=-(-self.config.train_data.slots_per_step // self.machine.num_gpus),
            value_bytes=self.model.lm_head.weight.element_size(),
            num_workers=self.config.train_data.num_workers,
            trained=self._state_bytes_under(sharding),
            decoding_bytes=self.decoding_bytes,
            evaluation_weights=self.config.evaluation.weights,
            rank_memory=self.machine.memory_of_rank,
        )
        return estimate_memory(sharding, self._sizes, self._activations.parts(shape), setting)

    def row(self, found: MemoryEstimate) -> ShardingRow:
        """One row of the table of shardings."""
        ranks = self.machine.ranks_of_node
        nvme, of_rank = found.nvme_bytes * ranks, found.device_bytes
        host_peak = found.host_peak(ranks)
        host = host_peak.host_bytes_of_node(ranks)
        if self.machine.device == "cpu":
            of_rank, host = found.process_bytes, found.process_bytes * ranks
        limits = [(of_rank, self.machine.gpu_memory), (host, self.machine.host_memory)]
        known = [needed <= limit for needed, limit in limits if limit is not None]
        fits = all(known) if known else None
        return ShardingRow(found.sharding.name, found.peak.name, of_rank, host, host_peak.name, nvme, fits)

    def costs(self, roofline_mfu: float | None) -> Costs:
        """The costs of all steps at the MFU of the machine, or else at that of the roofline, if there is one."""
        num_ranks, slots = self.machine.num_gpus, self.config.train_data.slots_per_step
        per_rank = -(-slots // num_ranks)
        num_steps = self.workload.data.num_steps if self.workload.data else self.config.num_steps
        micro_batches = (num_steps or 1) * slots / self.workload.num_averaged
        model_flops = self.flops.model(self.workload.needed) * micro_batches
        idle = 1 - slots / (per_rank * num_ranks)
        is_roofline = self.machine.mfu is None and roofline_mfu is not None
        mfu = roofline_mfu if is_roofline else self.machine.mfu
        peak = self._peak_tflops(is_roofline)
        seconds = None
        if mfu is not None and peak is not None:
            seconds = model_flops / (num_ranks * peak * 1e12 * mfu * (1 - idle))
        return Costs(
            num_steps=num_steps,
            micro_batches_per_rank=per_rank,
            model_flops=model_flops,
            hardware_flops=self.flops.hardware(self.workload.computed) * micro_batches,
            idle=idle,
            mfu=mfu,
            peak_tflops=peak,
            is_roofline=is_roofline,
            seconds=seconds,
        )

    def _peak_tflops(self, is_roofline: bool) -> float | None:
        gpu, given = self.machine.gpu, self.machine.peak_tflops
        if gpu is not None and (is_roofline or given is None):
            return gpu.peak_flops(self.config.model.precision) / 1e12
        return given

    def standard_shardings(self) -> list[Sharding]:
        """The standard shardings that exist in this precision: ZeRO-0 would sum gradients in half precision."""
        is_half = self.config.model.precision != "float32"
        return [one for one in STANDARD_SHARDINGS if not (is_half and one == ZeroSharding(0))]

    def _flops_with(self, config: RunConfig) -> TrainingFlops:
        """FLOPs with the checkpoints of a configuration; counted once for this one and all that it is copied to."""
        checkpointing = config.model.checkpointing
        if checkpointing not in self._flops:
            self._flops[checkpointing] = TrainingFlops(self.model, config.model)
        return self._flops[checkpointing]

    def _state_bytes_under(self, sharding: Sharding) -> StateBytes:
        if sharding not in self._state_bytes:
            self._state_bytes[sharding] = state_bytes(self.model, self.config.optimizer, sharding)
        return self._state_bytes[sharding]

    def _decoding_bytes(self) -> int:
        config, device_type = self.config, "cpu" if self.machine.device == "cpu" else "cuda"
        memory = DecodingMemory(self.model.config, config.model, config.evaluation, device_type)
        return memory.peak_bytes(self.workload.evaluation.shapes)


def meta_model_of(model: ModelConfig, trainable: TrainableConfig) -> TrainedVoxtral:
    """The model on the meta device, whatever attention and compilation this machine supports.

    Published models need neither files nor network: see `voxtral_dist.model.published`.

    Raises:
        UserError: its config.json is missing, or is not that of a Voxtral.
    """
    attention = "eager" if model.attention == "eager" else "sdpa"
    anywhere = model.model_copy(update={"attention": attention, "compile_blocks": False})
    return build_trained_model(voxtral_config_for_estimates(model.path), anywhere, trainable, DTYPES[model.precision])


def window_sizes(model: TrainedVoxtral, config: ModelConfig) -> WindowSizes:
    """The sizes of the window of a model, which may be on the meta device, and the positions that may be used."""
    return WindowSizes(
        seconds=window_seconds(model.config),
        audio_tokens=audio_tokens_per_window(model.config),
        max_positions=config.max_positions or model.config.text_config.max_position_embeddings,
    )
