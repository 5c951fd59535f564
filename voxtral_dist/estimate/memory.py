"""Memory of one rank, by kind, at the moments of a run when there may be most of it.

    P parameters, of which P_t are trained   W ranks that share one copy   s bytes of a value in the model's precision

Model states follow Rajbhandari et al. (arXiv 1910.02054): s P of weights, gradients, and 12 P_t of float32 weights and
both moments of Adam, each of them divided by W from its stage on. What DeepSpeed does beyond that was read in its code
(0.19.8) and is said where it is added up. Ranks of a GPU run share nothing; those of a CPU run have buffers, temporary
tensors and libraries of their own, which are terms of `CPU` alone.

Not in any figure: fragmentation of torch's allocator on GPUs, and data workers (in host memory).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from voxtral_dist.estimate.activations import Part, backward_peak, forward_peak
from voxtral_dist.estimate.sharding import Fsdp2Sharding, Place, Sharding, ZeroSharding
from voxtral_dist.evaluation.decoding_weights import gathers_weights
from voxtral_dist.model.blocks import blocks_of
from voxtral_dist.model.voxtral import TrainedVoxtral

DeviceKind = Literal["gpu", "cpu"]

MASTER_BYTES = 4
# Of both moments of a value, by `optimizer.algorithm`: two in float32, or Muon's one.
MOMENT_BYTES = {"adamw": 8, "muon": 4}
_FLOAT32_BYTES = 4
# Contexts of CUDA, NCCL and cuBLAS; not yet measured on a GPU.
_GPU_LIBRARY_BYTES = 2 * 10**9
# What DeepSpeed, autograd and oneDNN load and allocate after the start: measured with a model of 0.3 M parameters.
_CPU_LIBRARY_BYTES = 97 * 10**6
# DeepSpeed's norm of gradients and torch's plain AdamW hold two results of the size of what is updated.
_CPU_UPDATE_COPIES = 2


@dataclass(frozen=True)
class ModelSizes:
    """Numbers of values of a model's parameters.

    trained, frozen: in all. largest: of the largest parameter. largest_trained: of those with gradients. largest_unit:
    of what FSDP2 gathers together. sizes: of each parameter.
    """

    trained: int
    frozen: int
    largest: int
    largest_trained: int
    largest_unit: int
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, model: TrainedVoxtral) -> ModelSizes:
        """Of a model that may be on the meta device."""
        parameters = list(model.parameters())
        trained = [one.numel() for one in parameters if one.requires_grad]
        sizes = tuple(one.numel() for one in parameters)
        blocks = [block for of_component in blocks_of(model).values() for block in of_component]
        units = [sum(one.numel() for one in block.parameters()) for block in blocks]
        largest_unit = max([*units, model.lm_head.weight.numel()])
        return cls(sum(trained), sum(sizes) - sum(trained), max(sizes), max(trained), largest_unit, sizes)

    @property
    def all(self) -> int:
        """Trained and frozen ones."""
        return self.trained + self.frozen

    def persistent(self, threshold: int) -> int:
        """Values of small parameters, which ZeRO-3 leaves whole on every rank."""
        return sum(size for size in self.sizes if size <= threshold)


@dataclass(frozen=True)
class Setting:
    """What a run is planned for.

    num_ranks: of all nodes. num_micro_batches: of a rank in each step. value_bytes: of a value in the model's
    precision. moment_bytes: that the optimizer keeps of a value, see `MOMENT_BYTES`. decoding_bytes: see
    `DecodingMemory`; 0 without test sets. evaluation_weights: as in `EvaluationConfig.weights`. rank_memory: of
    a GPU, or of a process on a CPU; None where it is not known.
    """

    device: DeviceKind
    num_ranks: int
    num_micro_batches: int
    value_bytes: int
    moment_bytes: int = MOMENT_BYTES["adamw"]
    decoding_bytes: int = 0
    evaluation_weights: Literal["auto", "gathered", "sharded"] = "auto"
    rank_memory: float | None = None

    def evaluation(self, held: Phase, copy_bytes: float, unit_bytes: float) -> tuple[Phase, bool | None]:
        """The phase of an evaluation, and whether it gathers sharded weights; None where weights aren't sharded.

        Args:
            held: what a rank holds all the time.
            copy_bytes: of a whole copy of sharded weights; 0 where weights aren't sharded.
            unit_bytes: that a forward pass gathers at a time.
        """
        gathers = None
        if copy_bytes:
            in_use = held.process_bytes if self.device == "cpu" else held.device_bytes
            free = None if self.rank_memory is None else self.rank_memory - in_use
            gathers = gathers_weights(self.evaluation_weights, copy_bytes + self.decoding_bytes, free)
        more = {"gathered weights": copy_bytes if gathers else unit_bytes, "decoding": self.decoding_bytes}
        return Phase(held.name, held.device | more, held.host), gathers


@dataclass(frozen=True)
class Phase:
    """Bytes on a rank's device and in its share of host memory by kind, at one moment of a run."""

    name: str
    device: dict[str, float]
    host: dict[str, float]

    @property
    def device_bytes(self) -> float:
        """On the device."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> float:
        """In host memory."""
        return sum(self.host.values())

    @property
    def process_bytes(self) -> float:
        """Of a process on a CPU, where both are the same memory."""
        return self.device_bytes + self.host_bytes


@dataclass(frozen=True)
class MemoryEstimate:
    """The moments of a run under one sharding, and bytes on each rank's share of a drive."""

    sharding: Sharding
    phases: tuple[Phase, ...]
    nvme_bytes: float
    gathers_weights: bool | None = None

    @property
    def peak(self) -> Phase:
        """The moment with most on the device."""
        return max(self.phases, key=lambda phase: phase.device_bytes)

    @property
    def device_bytes(self) -> float:
        """Of a rank at its peak."""
        return self.peak.device_bytes

    @property
    def host_bytes(self) -> float:
        """Of a rank at its own peak."""
        return max(phase.host_bytes for phase in self.phases)

    @property
    def process_bytes(self) -> float:
        """Of a process on a CPU, where both are the same memory."""
        return max(phase.process_bytes for phase in self.phases)


def estimate_memory(sharding: Sharding, sizes: ModelSizes, parts: Sequence[Part], setting: Setting) -> MemoryEstimate:
    """Memory of the rank that has most of it."""
    if isinstance(sharding, Fsdp2Sharding):
        return _Fsdp2(sharding, sizes, parts, setting).estimate()
    return _Zero(sharding, sizes, parts, setting).estimate()


class _Zero:
    """DeepSpeed's stages 0 to 3."""

    def __init__(self, sharding: ZeroSharding, sizes: ModelSizes, parts: Sequence[Part], setting: Setting) -> None:
        self._sharding = sharding
        self._sizes = sizes
        self._parts = parts
        self._setting = setting
        self._size = setting.value_bytes
        self._ranks = setting.num_ranks
        self._mine = sizes.trained / setting.num_ranks
        self._bucket = min(sharding.reduce_bucket, sizes.trained)

    def estimate(self) -> MemoryEstimate:
        phases = [self._forward(), self._backward(), self._reduction(), self._update()]
        gathers = None
        if self._setting.decoding_bytes:
            evaluation, gathers = self._evaluation()
            phases.append(evaluation)
        nvme = 0.0
        if self._sharding.optimizer_place == "nvme":
            nvme += self._mine * (MASTER_BYTES + self._setting.moment_bytes + _FLOAT32_BYTES)
        if self._sharding.weights_place == "nvme":
            nvme += self._sizes.all / self._ranks * self._size
        return MemoryEstimate(self._sharding, tuple(phases), nvme, gathers)

    def _forward(self) -> Phase:
        activations = forward_peak(self._parts)
        gradients = self._held_gradients() if self._is_accumulating else self._fixed_gradients()
        return self._phase(
            "forward pass",
            gradients=gradients,
            activations=activations,
            gathered=self._gathered_in_forward(),
        )

    def _backward(self) -> Phase:
        """Gradients that are there already, or those that this backward pass leaves while activations go.

        A gradient is in the model's precision until its bucket is reduced, and ranks reduce a copy of the bucket.
        """
        held = self._held_gradients() if self._is_accumulating else self._fixed_gradients()
        growth = 0.0 if self._is_accumulating else (self._held_gradients() - held) / max(1, self._sizes.trained)
        if self._setting.device == "cpu" and self._sharding.stage >= 2:
            growth += self._size if self._fills_one_bucket else 0
        # Checkpointed blocks come twice in the backward pass: weights stay for fewer of them.
        visits = 3 if any(part.again for part in self._parts) else 2
        return self._phase(
            "backward pass",
            gradients=held,
            activations=backward_peak(self._parts, growth),
            gathered=self._live(self._sharding.max_reuse // visits),
            flight=0.0 if self._sharding.stage < 2 or self._fills_one_bucket else self._reduced_copy(),
            has_buckets=True,
        )

    def _reduction(self) -> Phase:
        """After the backward pass all that is left in buckets is reduced; stages 1 and 2 then add up their part."""
        gradients = self._held_gradients()
        if self._sharding.stage == 2 and self._is_accumulating:
            gradients += self._mine * _FLOAT32_BYTES
        flight = self._reduced_copy()
        if self._setting.device == "cpu" and self._sharding.stage == 2:
            flight += self._bucket * self._size
        gathered = self._live(self._sharding.max_reuse // 2)
        return self._phase(
            "reduction of gradients", gradients=gradients, gathered=gathered, flight=flight, has_buckets=True
        )

    def _update(self) -> Phase:
        """Gradients of what is updated together are copied into one float32 tensor; those of weights are gone.

        Stages 1 and 2 update a rank's whole part at once, stage 3 a group of it. On GPUs AdamW is one kernel.
        """
        at_once = self._mine if self._sharding.stage else self._sizes.largest_trained
        if self._sharding.stage == 3:
            at_once = min(at_once, self._sharding.sub_group)
        copies = _CPU_UPDATE_COPIES if self._setting.device == "cpu" else 0
        is_here = self._sharding.optimizer_place == "device"
        gradients = self._held_gradients() if self._sharding.stage in (0, 3) else self._mine * _FLOAT32_BYTES
        if self._sharding.stage == 2:
            gradients += self._mine * _FLOAT32_BYTES
        if self._sharding.stage == 3 and is_here:
            gradients += at_once * _FLOAT32_BYTES
        temporary = at_once * copies * _FLOAT32_BYTES if is_here else 0.0
        return self._phase("update", gradients=gradients, flight=temporary)

    def _evaluation(self) -> tuple[Phase, bool | None]:
        held = self._phase("evaluation", gradients=self._fixed_gradients())
        copy_bytes = self._sizes.all * self._size if self._sharding.stage == 3 else 0
        return self._setting.evaluation(held, copy_bytes, self._gathered_in_forward())

    def _gathered_in_forward(self) -> float:
        return self._live(self._sharding.max_live) + self._in_flight()

    def _phase(
        self,
        name: str,
        gradients: float,
        activations: float = 0.0,
        gathered: float = 0.0,
        flight: float = 0.0,
        has_buckets: bool = False,
    ) -> Phase:
        """has_buckets: whether gradients are on their way, so that stages 1 and 2 have buckets for them too."""
        weights = self._weights()
        buckets = self._buckets() if has_buckets or self._sharding.stage == 3 else 0.0
        device = {
            "weights": weights["device"],
            "gradients": gradients if self._sharding.optimizer_place == "device" else 0.0,
            "optimizer": self._optimizer()["device"],
            "activations": activations,
            "gathered weights": gathered,
            "buffers": buckets + flight,
            "libraries": library_bytes(self._setting),
        }
        host = {
            "weights": weights["host"],
            "gradients": self._host_gradients(),
            "optimizer": self._optimizer()["host"],
        }
        return Phase(name, device, host)

    def _weights(self) -> dict[Place, float]:
        """s P whole, or s P / W and what is too small to be sharded. What is on NVMe passes through five buffers."""
        places: dict[Place, float] = {"device": 0.0, "host": 0.0, "nvme": 0.0}
        if self._sharding.stage < 3:
            return places | {"device": self._sizes.all * self._size}
        places[self._sharding.weights_place] = self._sizes.all / self._ranks * self._size
        places["device"] += self._sizes.persistent(self._sharding.persistent_size) * self._size
        return places

    def _optimizer(self) -> dict[Place, float]:
        """12 P_t / W. Stage 0 in float32 updates the weights themselves, so it has moments alone.

        From NVMe some groups come at a time, each with its weights, gradients and moments.
        """
        places: dict[Place, float] = {"device": 0.0, "host": 0.0, "nvme": 0.0}
        if self._sharding.stage == 0:
            return places | {"device": self._sizes.trained * self._setting.moment_bytes}
        places[self._sharding.optimizer_place] = self._mine * (MASTER_BYTES + self._setting.moment_bytes)
        if self._sharding.optimizer_place == "nvme":
            group = min(self._sharding.sub_group, self._mine)
            places["host"] = self._sharding.num_swap_buffers * group * _FLOAT32_BYTES
        return places

    def _held_gradients(self) -> float:
        """After a backward pass: whole ones, in float32, for stages 0 and 1, a rank's part from stage 2 on."""
        return (self._sizes.trained if self._sharding.stage < 2 else self._mine) * _FLOAT32_BYTES

    def _fixed_gradients(self) -> float:
        """What is there all the time: stage 3 has one tensor for a rank's part."""
        return self._mine * _FLOAT32_BYTES if self._sharding.stage == 3 else 0.0

    def _host_gradients(self) -> float:
        """Stage 3 sums gradients in one tensor on the host, and copies them into another one for the update."""
        match self._sharding.optimizer_place:
            case "device":
                return 0.0
            case "host":
                return 2 * self._mine * _FLOAT32_BYTES
            case "nvme":
                return self._mine * _FLOAT32_BYTES

    def _live(self, most_values: int) -> float:
        """Stage 3: whole weights that are kept because they are used again soon, and all that are small enough.

        A single rank has nothing to gather, but for weights that are not on its device.
        """
        if self._sharding.stage < 3 or (self._ranks == 1 and self._sharding.weights_place == "device"):
            return 0.0
        return min(self._sizes.all, most_values + self._sizes.largest) * self._size

    def _in_flight(self) -> float:
        """What was fetched together stays, beside its copies in weights, until the last of it has been used."""
        if self._live(1) == 0:
            return 0.0
        return min(self._sizes.all, max(self._sharding.prefetch_bucket, self._sizes.largest)) * self._size

    def _buckets(self) -> float:
        """Stage 3 has one bucket all the time; stages 1 and 2 have theirs from the first gradient to the last.

        On a CPU only those pages of them exist that were written to.
        """
        if self._sharding.stage == 0:
            return 0.0
        is_float32 = self._sharding.stage == 1
        one = self._sharding.reduce_bucket * (_FLOAT32_BYTES if is_float32 else self._size)
        if self._setting.device == "cpu":
            return self._bucket * self._size if self._sharding.stage == 3 else 0.0
        return one * (2 if self._sharding.has_overlap and self._sharding.stage < 3 else 1)

    def _reduced_copy(self) -> float:
        """Gradients that are reduced together are copied into one tensor first, at least the largest one."""
        size = _FLOAT32_BYTES if self._sharding.stage < 2 else self._size
        return max(self._bucket, self._sizes.largest_trained) * size

    @property
    def _fills_one_bucket(self) -> bool:
        return self._sizes.trained <= self._sharding.reduce_bucket

    @property
    def _is_accumulating(self) -> bool:
        return self._setting.num_micro_batches > 1


class _Fsdp2:
    """torch's `fully_shard`, block by block: float32 shards, gathered in the model's precision."""

    def __init__(self, sharding: Fsdp2Sharding, sizes: ModelSizes, parts: Sequence[Part], setting: Setting) -> None:
        self._sharding = sharding
        self._sizes = sizes
        self._parts = parts
        self._setting = setting
        self._ranks = sharding.ranks_per_replica or setting.num_ranks

    def estimate(self) -> MemoryEstimate:
        phases = [
            self._phase("forward pass", forward_peak(self._parts), self._gathered()),
            self._phase("backward pass", backward_peak(self._parts), self._gathered(), self._reduced()),
            self._phase("update"),
        ]
        gathers = None
        if self._setting.decoding_bytes:
            copy_bytes = self._sizes.all * self._setting.value_bytes
            evaluation, gathers = self._setting.evaluation(self._phase("evaluation"), copy_bytes, self._gathered())
            phases.append(evaluation)
        return MemoryEstimate(self._sharding, tuple(phases), 0.0, gathers)

    def _phase(
        self,
        name: str,
        activations: float = 0.0,
        gathered: float = 0.0,
        buffers: float = 0.0,
    ) -> Phase:
        """Gradients are reduced to float32 shards in every micro-batch. Frozen weights have the model's precision."""
        frozen = self._sizes.frozen * self._setting.value_bytes
        states = {
            "weights": (self._sizes.trained * MASTER_BYTES + frozen) / self._ranks,
            "gradients": self._sizes.trained * _FLOAT32_BYTES / self._ranks,
            "optimizer": self._sizes.trained * self._setting.moment_bytes / self._ranks,
        }
        device = {
            "activations": activations,
            "gathered weights": gathered,
            "buffers": buffers,
            "libraries": library_bytes(self._setting),
        }
        if self._sharding.is_offloaded:
            return Phase(name, device, states)
        return Phase(name, states | device, {})

    def _gathered(self) -> float:
        """Two units, one that is used and one that is fetched, each with the buffer that ranks fill; or all weights."""
        units = self._sizes.all if not self._sharding.reshards else 2 * self._sizes.largest_unit
        return (min(units, self._sizes.all) + self._sizes.largest_unit) * self._setting.value_bytes

    def _reduced(self) -> float:
        """Of one unit: gradients in the model's precision, and a copy of them in that of their reduction."""
        return self._sizes.largest_unit * (self._setting.value_bytes + self._sharding.reduce_bytes)


def library_bytes(setting: Setting) -> float:
    """Of the libraries of a rank."""
    return _CPU_LIBRARY_BYTES if setting.device == "cpu" else _GPU_LIBRARY_BYTES
