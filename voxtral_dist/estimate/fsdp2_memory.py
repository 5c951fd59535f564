"""Memory of a rank under torch's FSDP2 (`fully_shard`): float32 partitions, gathered unit by unit."""

from __future__ import annotations

from collections.abc import Sequence

from voxtral_dist.estimate.parts import Part, backward_peak, forward_peak
from voxtral_dist.estimate.phases import MemoryEstimate, ModelSizes, Phase, Setting
from voxtral_dist.estimate.sharding import Fsdp2Sharding


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
        if self._sharding.is_offloaded:
            return Phase(name, device, states)
        return Phase(name, states | device, {})

    def _gathered(self) -> float:
        """Two units, the one in use and the next one, or all weights; and the buffer that ranks gather into."""
        units = self._sizes.all if not self._sharding.reshards else 2 * self._sizes.largest_unit
        return (min(units, self._sizes.all) + self._sizes.largest_unit) * self._setting.value_bytes

    def _reduced(self) -> float:
        """Gradients of a unit in the model's precision, and their copy in the precision of the reduction."""
        return self._sizes.largest_unit * (self._setting.value_bytes + self._sharding.reduce_bytes)
