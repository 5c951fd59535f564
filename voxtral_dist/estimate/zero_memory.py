"""Memory of a rank under DeepSpeed's ZeRO stages 0 to 3, as the code of DeepSpeed 0.19.8 allocates it."""

from __future__ import annotations

from collections.abc import Sequence

from voxtral_dist.estimate.parts import Part, backward_peak, forward_peak
from voxtral_dist.estimate.phases import FLOAT32_BYTES, MASTER_BYTES, MemoryEstimate, ModelSizes, Phase, Setting
from voxtral_dist.estimate.sharding import Place, ZeroSharding
from voxtral_dist.estimate.zero_host_memory import mean_checkpoint_bytes, play_building

# DeepSpeed's norm of gradients and torch's plain AdamW hold two results of the size of what is updated.
_CPU_UPDATE_COPIES = 2


class ZeroMemory:
    """The phases of a run under one ZeRO stage."""

    def __init__(self, sharding: ZeroSharding, sizes: ModelSizes, parts: Sequence[Part], setting: Setting) -> None:
        self._sharding = sharding
        self._sizes = sizes
        self._parts = parts
        self._setting = setting
        self._size = setting.value_bytes
        self._ranks = setting.num_ranks
        self._partition = sizes.trained / setting.num_ranks
        self._bucket = min(sharding.reduce_bucket, sizes.trained)
        self._building = play_building(sharding, sizes, setting)

    def estimate(self) -> MemoryEstimate:
        """All phases."""
        phases = [self._forward(), self._backward(), self._reduction(), self._update()]
        if self._setting.device == "gpu":
            phases = [self._build(), *phases, self._saving(), self._export()]
        gathers = None
        if self._setting.decoding_bytes:
            evaluation, gathers = self._evaluation()
            phases.append(evaluation)
        nvme = 0.0
        if self._sharding.optimizer_place == "nvme":
            nvme += self._partition * (MASTER_BYTES + self._setting.trained.moments + FLOAT32_BYTES)
        if self._sharding.weights_place == "nvme":
            nvme += self._sizes.all / self._ranks * self._size
        return MemoryEstimate(self._sharding, tuple(phases), nvme, gathers)

    def _build(self) -> Phase:
        """Building: a parameter is sharded after the other, and gradients are zeros in pageable memory first."""
        held = self._phase("building", gradients=self._fixed_gradients(), gathered=self._sizes.largest * self._size)
        return Phase(held.name, held.device, self._building.peak | self._process())

    def _saving(self) -> Phase:
        """A checkpoint: each parameter passes through the device of the rank that writes it, in float32."""
        whole = self._sizes.largest_trained * FLOAT32_BYTES
        held = self._phase("saving", gradients=self._fixed_gradients(), gathered=whole)
        pending = mean_checkpoint_bytes(self._sizes, self._setting)
        return Phase(held.name, held.device, {**held.host, "checkpoint": pending})

    def _export(self) -> Phase:
        return self._setting.export(self._phase("export", gradients=self._fixed_gradients()), self._sizes)

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
        """The backward pass: gradients of earlier micro-batches are held, or new ones grow while activations go.

        A gradient is in the model's precision until its bucket is reduced, and ranks reduce a copy of the bucket.
        """
        held = self._held_gradients() if self._is_accumulating else self._fixed_gradients()
        growth = 0.0 if self._is_accumulating else (self._held_gradients() - held) / max(1, self._sizes.trained)
        if self._setting.device == "cpu" and self._sharding.stage >= 2:
            growth += self._size if self._fills_one_bucket else 0
        # The backward pass visits checkpointed blocks twice, so weights stay for fewer of them.
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
        """The end of the backward pass: the last buckets are reduced, and stages 1 and 2 sum up their partition."""
        gradients = self._held_gradients()
        if self._sharding.stage == 2 and self._is_accumulating:
            gradients += self._partition * FLOAT32_BYTES
        flight = self._reduced_copy()
        if self._setting.device == "cpu" and self._sharding.stage == 2:
            flight += self._bucket * self._size
        gathered = self._live(self._sharding.max_reuse // 2)
        return self._phase(
            "reduction of gradients", gradients=gradients, gathered=gathered, flight=flight, has_buckets=True
        )

    def _update(self) -> Phase:
        """The optimizer's step: gradients of what is updated together are copied into one float32 tensor.

        Stages 1 and 2 update a rank's whole partition at once, stage 3 a group of it. On GPUs AdamW is one kernel.
        """
        at_once = self._partition if self._sharding.stage else self._sizes.largest_trained
        if self._sharding.stage == 3:
            at_once = min(at_once, self._sharding.sub_group)
        copies = _CPU_UPDATE_COPIES if self._setting.device == "cpu" else 0
        is_on_device = self._sharding.optimizer_place == "device"
        gradients = self._held_gradients() if self._sharding.stage in (0, 3) else self._partition * FLOAT32_BYTES
        if self._sharding.stage == 2:
            gradients += self._partition * FLOAT32_BYTES
        if self._sharding.stage == 3 and is_on_device:
            gradients += at_once * FLOAT32_BYTES
        temporary = at_once * copies * FLOAT32_BYTES if is_on_device else 0.0
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
        """has_buckets: whether gradients are being reduced, for which stages 1 and 2 hold buckets too."""
        weights = self._weights()
        buckets = self._buckets() if has_buckets or self._sharding.stage == 3 else 0.0
        device = {
            "weights": weights["device"],
            "gradients": gradients if self._sharding.optimizer_place == "device" else self._gradients_before_copy(),
            "optimizer": self._optimizer()["device"],
            "activations": activations,
            "gathered weights": gathered,
            "buffers": buckets + flight,
            "libraries": self._setting.library_bytes,
        }
        return Phase(name, device, self._host())

    def _host(self) -> dict[str, float]:
        """Host memory in all phases after building: what is left of it, moments, and buffers of what is on a drive."""
        held: dict[str, float] = {"weights": 0.0, "gradients": 0.0, "optimizer": 0.0, **self._building.now()}
        if self._sharding.optimizer_place == "host":
            held["optimizer"] += self._partition * self._setting.trained.moments
            if self._sharding.stage < 3 and self._size == FLOAT32_BYTES and self._is_accumulating:
                held["gradients"] += self._partition * FLOAT32_BYTES
        if self._sharding.optimizer_place == "nvme":
            # Groups are swapped in one after the other, each with its weights, gradients and moments.
            group = min(self._sharding.sub_group, self._partition)
            held["optimizer"] += self._sharding.num_swap_buffers * group * FLOAT32_BYTES
        if self._sharding.weights_place == "nvme":
            held["weights"] += self._sharding.num_weight_buffers * self._sizes.largest / self._ranks * self._size
        return held | self._process()

    def _process(self) -> dict[str, float]:
        return {"process and workers": self._setting.process_host_bytes} if self._setting.device == "gpu" else {}

    def _weights(self) -> dict[Place, float]:
        """s P; under stage 3 s P / W, and s for each value of the parameters that are too small to be sharded."""
        places: dict[Place, float] = {"device": 0.0, "host": 0.0, "nvme": 0.0}
        if self._sharding.stage < 3:
            return places | {"device": self._sizes.all * self._size}
        places[self._sharding.weights_place] = self._sizes.all / self._ranks * self._size
        places["device"] += self._sizes.persistent(self._sharding.persistent_size) * self._size
        return places

    def _optimizer(self) -> dict[Place, float]:
        """12 P_t / W. Stage 0 in float32 updates the weights themselves, so it holds only moments."""
        places: dict[Place, float] = {"device": 0.0, "host": 0.0, "nvme": 0.0}
        if self._sharding.stage == 0:
            return places | {"device": self._sizes.trained * self._setting.trained.moments}
        places[self._sharding.optimizer_place] = self._partition * (MASTER_BYTES + self._setting.trained.moments)
        return places

    def _held_gradients(self) -> float:
        """Float32 gradients after a backward pass: of all parameters in stages 0 and 1, else of a partition."""
        return (self._sizes.trained if self._sharding.stage < 2 else self._partition) * FLOAT32_BYTES

    def _fixed_gradients(self) -> float:
        """Gradients that are allocated all the time: stage 3 has one tensor for a rank's partition."""
        return self._partition * FLOAT32_BYTES if self._sharding.stage == 3 else 0.0

    def _gradients_before_copy(self) -> float:
        """Gradients on the device under an offloaded optimizer: stages 1 and 2 sum those of half precision there."""
        is_summed = self._sharding.stage < 3 and self._size < FLOAT32_BYTES
        return self._partition * FLOAT32_BYTES if is_summed else 0.0

    def _live(self, max_values: int) -> float:
        """Gathered weights of stage 3 that stay because they are used again soon, and the one that is in use.

        A single rank gathers nothing, unless its weights are not on its device.
        """
        if self._sharding.stage < 3 or (self._ranks == 1 and self._sharding.weights_place == "device"):
            return 0.0
        return min(self._sizes.all, max_values + self._sizes.largest) * self._size

    def _in_flight(self) -> float:
        """Weights that were fetched together stay, beside their copies, until the last of them has been used.

        The weight with which a prefetch reaches its limit is still fetched.
        """
        if self._live(1) == 0:
            return 0.0
        return min(self._sizes.all, self._sharding.prefetch_bucket + self._sizes.largest) * self._size

    def _buckets(self) -> float:
        """Stage 3 holds one bucket all the time; stages 1 and 2 hold theirs while gradients are reduced.

        On a CPU, pages of a bucket that were never written to take no memory.
        """
        if self._sharding.stage == 0:
            return 0.0
        is_float32 = self._sharding.stage == 1
        one = self._sharding.reduce_bucket * (FLOAT32_BYTES if is_float32 else self._size)
        if self._setting.device == "cpu":
            return self._bucket * self._size if self._sharding.stage == 3 else 0.0
        return one * (2 if self._sharding.has_overlap and self._sharding.stage < 3 else 1)

    def _reduced_copy(self) -> float:
        """Gradients that are reduced together are copied into one tensor first, at least the largest one."""
        size = FLOAT32_BYTES if self._sharding.stage < 2 else self._size
        return max(self._bucket, self._sizes.largest_trained) * size

    @property
    def _fills_one_bucket(self) -> bool:
        return self._sizes.trained <= self._sharding.reduce_bucket

    @property
    def _is_accumulating(self) -> bool:
        return self._setting.num_micro_batches > 1
