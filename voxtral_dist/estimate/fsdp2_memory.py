"""Memory of a rank under torch's FSDP2 (`fully_shard`): float32 partitions, gathered unit by unit.

With `cpu_offload` torch pins each partition of a parameter in host memory before the first forward pass
(`_fsdp_param.py:reset_sharded_param`), and each gradient when the first micro-batch of a step has reduced it
(`_fsdp_collectives.py:foreach_reduce`). Gradients are freed in the update, and their blocks are used again in the next
step. For that they are rounded up to powers of two: blocks of their own size would be pinned again in every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from voxtral_dist.estimate.host_ledger import PinnedPool
from voxtral_dist.estimate.parts import Part, backward_peak, forward_peak
from voxtral_dist.estimate.phases import MemoryEstimate, ModelSizes, Phase, Setting
from voxtral_dist.estimate.sharding import Fsdp2Sharding


def pinned_weights(sizes: ModelSizes, setting: Setting, num_ranks: int) -> list[int]:
    """Bytes of the partition of each parameter: as the optimizer keeps it if it is trained."""
    return [
        int(-(-size // num_ranks) * (setting.trained.weight if is_trained else setting.value_bytes))
        for size, is_trained in zip(sizes.sizes, sizes.are_trained, strict=True)
    ]


# An estimate is made for each of many micro-batches, which all need this.
@lru_cache(maxsize=64)
def pinned_states(sizes: ModelSizes, setting: Setting, num_ranks: int) -> dict[str, float]:
    """Host memory of a rank by kind: partitions in pinned memory, and moments, which are pageable.

    The gradient of a later micro-batch is pageable too, until it has been added to the first one's.
    """
    pool = PinnedPool(max_cached=None)
    weights = pinned_weights(sizes, setting, num_ranks)
    trained = [-(-size // num_ranks) for group in sizes.groups for size in group]
    return {
        "weights": sum(pool.block_bytes(num_bytes) for num_bytes in weights),
        "gradients": sum(pool.block_bytes(int(size * setting.trained.gradient)) for size in trained),
        "optimizer": sum(trained) * setting.trained.moments,
        "buffers": max(trained) * setting.trained.gradient,
    }


class Fsdp2Memory:
    """The phases of a run under FSDP2, whose units are the blocks."""

    def __init__(self, sharding: Fsdp2Sharding, sizes: ModelSizes, parts: Sequence[Part], setting: Setting) -> None:
        self._sharding = sharding
        self._sizes = sizes
        self._parts = parts
        self._setting = setting
        self._ranks = sharding.ranks_per_replica or setting.num_ranks

    def estimate(self) -> MemoryEstimate:
        """All phases."""
        phases = [
            self._phase("forward pass", forward_peak(self._parts), self._gathered()),
            self._phase("backward pass", backward_peak(self._parts), self._gathered(), self._reduced()),
            self._phase("update"),
        ]
        if self._setting.device == "gpu":
            phases.append(self._setting.export(self._phase("export"), self._sizes))
        gathers = None
        if self._setting.decoding_bytes:
            copy_bytes = self._sizes.all * self._setting.value_bytes
            evaluation, gathers = self._setting.evaluation(self._phase("evaluation"), copy_bytes, self._gathered())
            phases.append(evaluation)
        return MemoryEstimate(self._sharding, tuple(phases), 0.0, gathers)

    def _phase(self, name: str, activations: float = 0.0, gathered: float = 0.0, buffers: float = 0.0) -> Phase:
        """Every micro-batch reduces its gradients to float32 partitions. Frozen weights have the model's precision."""
        frozen = self._sizes.frozen * self._setting.value_bytes
        states = {
            "weights": (self._sizes.trained * self._setting.trained.weight + frozen) / self._ranks,
            "gradients": self._sizes.trained * self._setting.trained.gradient / self._ranks,
            "optimizer": self._sizes.trained * self._setting.trained.moments / self._ranks,
        }
        device = {
            "activations": activations,
            "gathered weights": gathered,
            "buffers": buffers,
            "libraries": self._setting.library_bytes,
        }
        if self._setting.device == "cpu":
            return Phase(name, device, states) if self._sharding.is_offloaded else Phase(name, states | device, {})
        process = {"process and workers": self._setting.process_host_bytes}
        if self._sharding.is_offloaded:
            return Phase(name, device, pinned_states(self._sizes, self._setting, self._ranks) | process)
        return Phase(name, states | device, process)

    def _gathered(self) -> float:
        """Two units, the one in use and the next one, or all weights; and the buffer that ranks gather into."""
        units = self._sizes.all if not self._sharding.reshards else 2 * self._sizes.largest_unit
        return (min(units, self._sizes.all) + self._sizes.largest_unit) * self._setting.value_bytes

    def _reduced(self) -> float:
        """Gradients of a unit in the model's precision, and their copy in the precision of the reduction."""
        return self._sizes.largest_unit * (self._setting.value_bytes + self._sharding.reduce_bytes)
