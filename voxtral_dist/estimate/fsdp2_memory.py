"""Memory of a rank under torch's FSDP2 (`fully_shard`): float32 partitions, gathered and reduced unit by unit.

What is alive when follows from torch 2.13's code (`torch/distributed/fsdp/_fully_shard`), for a unit of u values, of
which t are trained, with W ranks, s bytes of a value in the model's precision and r in that of the reduction:

    gathering    ranks gather into a buffer of s u bytes and copy it into the parameters, s u. In the forward pass the
                 buffer stays until the next unit has been copied; in the backward pass it is freed at once, but that
                 of the next unit is fetched already (`FSDPParamGroup.wait_for_unshard`, `_backward_prefetch`). One rank
                 has no buffer, but a copy of one parameter at a time.
    computing    the backward pass adds the gradients, s t, beside the input of the reduction before, which stays until
                 the next one begins (`reduce_scatter_states`).
    reducing     the unit's weights are freed. Its gradients are copied into the input of the reduction, s t + r t, and
                 freed, except for one that a variable of a loop over several ranks still names (`foreach_reduce`). The
                 output is r t / W, and a copy of it where gradients are kept in another precision. The output of the
                 first micro-batch becomes the gradient; that of a later one is added to it.

The last layer stays gathered between its forward and its backward pass, and the embeddings are not gathered for the
backward pass (`engine.fsdp2.sharding.shard_model`). Norms outside of blocks are counted with their neighbours.

With `cpu_offload` torch pins each partition of a parameter in host memory before the first forward pass
(`_fsdp_param.py:reset_sharded_param`), and each gradient when the first micro-batch of a step has reduced it
(`_fsdp_collectives.py:foreach_reduce`). Gradients are freed in the update, and their blocks are used again in the next
step. For that they are rounded up to powers of two: blocks of their own size would be pinned again in every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from voxtral_dist.estimate.activations import EMBEDDINGS
from voxtral_dist.estimate.host_ledger import PinnedPool
from voxtral_dist.estimate.parts import Part
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
    """The phases of a run under FSDP2, whose units are the parts of the model."""

    def __init__(self, sharding: Fsdp2Sharding, sizes: ModelSizes, parts: Sequence[Part], setting: Setting) -> None:
        self._sharding = sharding
        self._sizes = sizes
        self._parts = parts
        self._setting = setting
        self._size = setting.value_bytes
        self._ranks = sharding.ranks_per_replica or setting.num_ranks

    def estimate(self) -> MemoryEstimate:
        """All phases, each at the moment when it holds most."""
        phases = [_most(self._forward()), _most(self._backward()), self._phase("update", self._all_gradients)]
        if self._setting.device == "gpu":
            phases.append(self._setting.export(self._phase("export", 0.0), self._sizes))
        gathers = None
        if self._setting.decoding_bytes:
            copy_bytes = self._sizes.all * self._size
            held = self._phase("evaluation", 0.0)
            evaluation, gathers = self._setting.evaluation(held, copy_bytes, self._gathered_in_decoding())
            phases.append(evaluation)
        return MemoryEstimate(self._sharding, tuple(phases), 0.0, gathers)

    def _forward(self) -> Iterator[Phase]:
        """The moments of the forward pass of a step's last micro-batch: each part is gathered, then computed."""
        gradients = self._all_gradients if self._is_accumulating else 0.0
        before = stays = buffer = 0.0
        for part in self._parts:
            unit = self._unit(part)
            yield self._phase("forward pass", gradients, before, stays + buffer + unit + self._gathering(part))
            buffer = self._buffer(unit)
            yield self._phase("forward pass", gradients, before + part.kept + part.passing, stays + unit + buffer)
            before += part.kept
            stays += 0.0 if self._sharding.reshards else part.num_values * self._size

    def _backward(self) -> Iterator[Phase]:
        """The moments of the backward pass of a step's last micro-batch, from the last part to the first.

        Each part is gathered, computed to its widest place, then to its end, and reduced. Gradients grow if this is the
        step's only micro-batch.
        """
        gradients = self._all_gradients if self._is_accumulating else 0.0
        before, reducing = sum(part.kept for part in self._parts), 0.0
        weights = [self._gathered_for_backward(part) for part in self._parts]
        for number in reversed(range(len(self._parts))):
            part = self._parts[number]
            if not part.is_reached:
                continue
            fetched = self._fetched(number)
            gathered = weights[number] + fetched
            if number < len(self._parts) - 1 and self._sharding.reshards:
                buffer = self._gathering(part) if weights[number] else 0.0
                yield self._phase("backward pass", gradients, before, weights[number] + buffer, reducing)
            widest = before + part.again + part.working
            yield self._phase("backward pass", gradients, widest, gathered, reducing + part.num_widest * self._size)
            before -= part.kept
            after, unreduced = before + part.leaving, part.num_trained * self._size
            yield self._phase("backward pass", gradients, after, gathered, reducing + unreduced)
            if part.num_trained == 0:
                continue
            at_once = min(part.num_trained, self._num_gathered(part))
            reducing = at_once * self._sharding.reduce_bytes
            yield self._phase("backward pass", gradients, after, fetched, unreduced + reducing)
            named = part.largest * self._size if self._ranks > 1 else 0.0
            yield self._phase("backward pass", gradients, after, fetched, reducing + self._reduced(at_once) + named)
            if not self._is_accumulating:
                gradients += part.num_trained * self._setting.trained.gradient / self._ranks

    def _phase(
        self, name: str, gradients: float, activations: float = 0.0, gathered: float = 0.0, buffers: float = 0.0
    ) -> Phase:
        """A moment. Frozen weights have the model's precision; offloaded gradients are copied as they are reduced."""
        frozen = self._sizes.frozen * self._size
        states = {
            "weights": (self._sizes.trained * self._setting.trained.weight + frozen) / self._ranks,
            "gradients": gradients,
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

    def _num_gathered(self, part: Part) -> int:
        return part.num_values if part.num_gathered is None else part.num_gathered

    def _unit(self, part: Part) -> float:
        return self._num_gathered(part) * self._size

    def _buffer(self, unit: float) -> float:
        """The buffer that ranks gather a unit into; one rank has none."""
        return unit if self._ranks > 1 else 0.0

    def _gathering(self, part: Part) -> float:
        """What is held beside a unit's weights while they are gathered."""
        return self._unit(part) if self._ranks > 1 else part.largest * self._size

    def _gathered_for_backward(self, part: Part) -> float:
        """A part's weights in its backward pass: all that it has, because chunks of the encoder stay gathered."""
        is_used = part is not self._embeddings and part.is_reached
        return part.num_values * self._size if is_used or not self._sharding.reshards else 0.0

    def _fetched(self, number: int) -> float:
        """Weights beside those of a part in the backward pass: the next unit's buffer, or all that were kept."""
        if not self._sharding.reshards:
            return sum(part.num_values for part in self._parts[:number]) * self._size
        is_fetched = number > 0 and self._parts[number - 1] is not self._embeddings
        return self._buffer(self._unit(self._parts[number - 1])) if is_fetched else 0.0

    def _reduced(self, num_values: int) -> float:
        """The output of a reduction, and its copy where gradients are kept in another precision."""
        reduced, kept = self._sharding.reduce_bytes, self._setting.trained.gradient
        return num_values / self._ranks * (reduced if reduced == kept else reduced + kept)

    def _gathered_in_decoding(self) -> float:
        """Twice the largest unit while it is gathered, and the last layer, which stays; or all weights."""
        units = self._sizes.all if not self._sharding.reshards else 2 * self._sizes.largest_unit
        return (min(units, self._sizes.all) + self._sizes.largest_unit) * self._size

    @property
    def _embeddings(self) -> Part:
        return next(part for part in self._parts if part.name == EMBEDDINGS)

    @property
    def _all_gradients(self) -> float:
        return self._sizes.trained * self._setting.trained.gradient / self._ranks

    @property
    def _is_accumulating(self) -> bool:
        return self._setting.num_micro_batches > 1


def _most(moments: Iterator[Phase]) -> Phase:
    return max(moments, key=lambda phase: phase.device_bytes)
