"""How an engine shards a model over ranks, as numbers: as configured, and the standard choices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from voxtral_dist.config import EngineConfig, Fsdp2Config
from voxtral_dist.engine.fsdp2.sharding import refuse_partial_replicas
from voxtral_dist.engine.zero.settings import read_deepspeed_file
from voxtral_dist.output.counting import counted

Place = Literal["device", "host", "nvme"]

_PLACES: dict[str, Place] = {"none": "device", "cpu": "host", "nvme": "nvme"}


@dataclass(frozen=True)
class ZeroSharding:
    """The `zero_optimization` of a DeepSpeed file, with DeepSpeed's defaults. Sizes are numbers of values.

    stage: 0 to 3. optimizer_place: where float32 weights and their moments are kept. weights_place: where partitions of
    the weights are kept. has_overlap: whether communication overlaps computation, which needs a second bucket.
    reduce_bucket: gradients that are reduced together. prefetch_bucket, max_live, max_reuse, persistent_size: of stage
    3, see DeepSpeed's keys `stage3_*`. sub_group: values that stage 3 updates together. num_swap_buffers,
    num_weight_buffers: through which optimizer and weights pass from and to NVMe. pins_optimizer, pins_weights: whether
    what is offloaded is in pinned memory, from which a GPU copies faster. all_reduces: whether stages 1 and 2 sum
    gradients by all-reduces, as DeepSpeed does by default, instead of one reduction to each rank.
    """

    stage: int
    optimizer_place: Place = "device"
    weights_place: Place = "device"
    has_overlap: bool = False
    reduce_bucket: int = 500_000_000
    prefetch_bucket: int = 50_000_000
    max_live: int = 1_000_000_000
    max_reuse: int = 1_000_000_000
    persistent_size: int = 100_000
    sub_group: int = 1_000_000_000
    num_swap_buffers: int = 4
    num_weight_buffers: int = 5
    pins_optimizer: bool = True
    pins_weights: bool = True
    all_reduces: bool = True

    @property
    def uses_host(self) -> bool:
        """Whether weights or states pass through host memory in every step."""
        return (self.optimizer_place, self.weights_place) != ("device", "device")

    @property
    def name(self) -> str:
        """A name such as `ZeRO-3, optimizer in host memory`."""
        places = {"host": "in host memory", "nvme": "on NVMe"}
        optimizer = places.get(self.optimizer_place)
        weights = places.get(self.weights_place)
        if optimizer and optimizer == weights:
            return f"ZeRO-{self.stage}, optimizer and weights {optimizer}"
        parts = [f"ZeRO-{self.stage}"]
        parts += [f"optimizer {optimizer}"] if optimizer else []
        parts += [f"weights {weights}"] if weights else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Fsdp2Sharding:
    """The section `engine.fsdp2`.

    reshards: `reshard_after_forward`. ranks_per_replica: None for all ranks. reduce_bytes: of a value whose gradient is
    reduced. is_offloaded: whether the partitions are in host memory.
    """

    reshards: bool = True
    ranks_per_replica: int | None = None
    reduce_bytes: int = 4
    is_offloaded: bool = False

    @property
    def uses_host(self) -> bool:
        """Whether weights and states pass through host memory in every step."""
        return self.is_offloaded

    @property
    def name(self) -> str:
        """A name such as `FSDP2, weights kept until the backward pass`."""
        parts = ["FSDP2"]
        parts += [] if self.reshards else ["weights kept until the backward pass"]
        parts += [f"{counted(self.ranks_per_replica, 'rank')} per replica"] if self.ranks_per_replica else []
        parts += ["all in host memory"] if self.is_offloaded else []
        return ", ".join(parts)


Sharding = ZeroSharding | Fsdp2Sharding


def configured_sharding(engine: EngineConfig, num_ranks: int) -> Sharding:
    """The sharding that a configuration asks for.

    Raises:
        UserError: DeepSpeed's file is not usable, or the number of ranks is no multiple of `ranks_per_replica`.
    """
    if engine.fsdp2 is not None:
        return _fsdp2(engine.fsdp2, num_ranks)
    return zero_sharding(read_deepspeed_file(engine.deepspeed)["zero_optimization"])


def _fsdp2(settings: Fsdp2Config, num_ranks: int) -> Fsdp2Sharding:
    refuse_partial_replicas(settings, num_ranks)
    reduce_bytes = 4 if settings.reduce_precision == "float32" else 2
    return Fsdp2Sharding(settings.reshard_after_forward, settings.ranks_per_replica, reduce_bytes, settings.cpu_offload)


def zero_sharding(zero: Mapping[str, Any]) -> ZeroSharding:
    """The sharding that a DeepSpeed file's `zero_optimization` describes."""
    stage = int(zero["stage"])
    optimizer, weights = (zero.get(key) or {} for key in ("offload_optimizer", "offload_param"))
    overlap = zero.get("overlap_comm")
    plain = ZeroSharding(stage)

    def size(key: str, default: int) -> int:
        # Integers may be written as 5e7.
        return int(zero.get(key, default))

    return ZeroSharding(
        stage=stage,
        optimizer_place=_PLACES[optimizer.get("device", "none")],
        weights_place=_PLACES[weights.get("device", "none")],
        has_overlap=stage == 3 if overlap is None else bool(overlap),
        reduce_bucket=size("reduce_bucket_size", plain.reduce_bucket),
        prefetch_bucket=size("stage3_prefetch_bucket_size", plain.prefetch_bucket),
        max_live=size("stage3_max_live_parameters", plain.max_live),
        max_reuse=size("stage3_max_reuse_distance", plain.max_reuse),
        persistent_size=size("stage3_param_persistence_threshold", plain.persistent_size),
        sub_group=size("sub_group_size", plain.sub_group),
        num_swap_buffers=int(optimizer.get("buffer_count", plain.num_swap_buffers)),
        num_weight_buffers=int(weights.get("buffer_count", plain.num_weight_buffers)),
        pins_optimizer=bool(optimizer.get("pin_memory", plain.pins_optimizer)),
        pins_weights=bool(weights.get("pin_memory", plain.pins_weights)),
        all_reduces=bool(zero.get("use_multi_rank_bucket_allreduce", plain.all_reduces))
        or not zero.get("reduce_scatter", True),
    )


# With the buckets of ds_configs/: DeepSpeed's defaults are for larger machines.
_ZERO3 = ZeroSharding(
    3, has_overlap=True, reduce_bucket=50_000_000, prefetch_bucket=100_000_000, persistent_size=10_000
)
_ZERO2 = ZeroSharding(2, has_overlap=True, reduce_bucket=50_000_000)
STANDARD_SHARDINGS: tuple[Sharding, ...] = (
    ZeroSharding(0),
    ZeroSharding(1),
    _ZERO2,
    replace(_ZERO2, optimizer_place="host"),
    _ZERO3,
    replace(_ZERO3, optimizer_place="host"),
    replace(_ZERO3, optimizer_place="host", weights_place="host"),
    replace(
        _ZERO3,
        optimizer_place="nvme",
        weights_place="nvme",
        prefetch_bucket=0,
        sub_group=100_000_000,
        num_weight_buffers=8,
    ),
    Fsdp2Sharding(),
    Fsdp2Sharding(reshards=False),
    Fsdp2Sharding(is_offloaded=True),
)
