"""`voxtral-dist plan --scale`: a model of the time of a step, and of a run, on one GPU to hundreds of them.

A step of V slots on W ranks has m = ceil(V / W) rounds of micro-batches. Its time is the sum of

    compute         what the roofline gives for the mean micro-batch, times V / W; casts, copies and the update of the
                    engine (`times`)
    idle ranks      the rest of m micro-batches, where W does not divide V
    stragglers      the expected maximum over ranks, minus the mean, of what micro-batches of the plan cost in FLOPs: in
                    each round where micro-batches exchange weights or gradients, else once (`stragglers`)
    communication   what the engine sends (`communication`) by the rings and trees of NCCL (`interconnect`). Hidden
                    collectives run beside the computation of the same pass, so only what takes longer than this counts,
                    and the first call, before which there is nothing to compute; they do not slow computation down
    data            what reading takes longer than all this: a worker decodes 2,800 seconds of FLAC a second
                    (docs/benchmarks.md, short utterances); all ranks share the storage, at 18 kB a second of audio

and the time of a run that of all steps and of

    saves           a checkpoint leaves a rank by PCIe (25 GB/s), and is written meanwhile, at the bandwidth of the
                    storage; the next one waits for it. Saves before evaluations and at the end, and those that are not
                    `asynchronous`, are waited for
    evaluations     all audio of the test sets over W GPUs (`decoding_rate`)

With more ranks than slots, a step has as many slots as ranks, and a run fewer steps, for the same audio: another global
batch. Efficiency is the speed of a GPU in steps over that of its kernels alone: without other ranks, waits and saves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from voxtral_dist.config import RunConfig
from voxtral_dist.errors import UserError
from voxtral_dist.estimate.checkpointing import estimator_with_chosen_checkpointing
from voxtral_dist.estimate.communication import Collective, Communication
from voxtral_dist.estimate.decoding_rate import decoding_rate
from voxtral_dist.estimate.engine_traffic import engine_traffic
from voxtral_dist.estimate.estimator import Estimator, Machine
from voxtral_dist.estimate.gpus import Gpu
from voxtral_dist.estimate.interconnect import Interconnect, Network
from voxtral_dist.estimate.quantities import gigabytes, milliseconds, table_lines
from voxtral_dist.estimate.roofline import KernelTime, Roofline
from voxtral_dist.estimate.sharding import Sharding, ZeroSharding, configured_sharding
from voxtral_dist.estimate.state_bytes import checkpoint_bytes
from voxtral_dist.estimate.stragglers import slowest_rank
from voxtral_dist.estimate.times import TimeEstimator, compiles_blocks
from voxtral_dist.estimate.workload import computed_shape
from voxtral_dist.model.encoder import num_chunks
from voxtral_dist.output.counting import counted
from voxtral_dist.output.duration import duration

_DECODED_BY_WORKER, _STORED_BYTES_PER_SECOND = 2800.0, 18e3
_HOST_COPY_BANDWIDTH = 25e9


@dataclass(frozen=True)
class ScaleRow:
    """A run on some GPUs.

    slots_per_step: see the module. step: seconds by part, and their sum in `step_seconds`. audio_rate: seconds of audio
    in a second of training. bound: the largest part of the run. num_steps, run: None where the number of steps is not
    known; `run` has seconds of steps, saves and evaluations. sent_bytes: of a rank in a step. device_bytes: the peak of
    a GPU's memory.
    """

    num_gpus: int
    slots_per_step: int
    step: dict[str, float]
    step_seconds: float
    audio_rate: float
    efficiency: float
    bound: str
    num_steps: int | None
    run: dict[str, float] | None
    sent_bytes: float
    device_bytes: float
    fits: bool | None

    @property
    def run_seconds(self) -> float | None:
        """Seconds of the whole run."""
        return None if self.run is None else sum(self.run.values())


@dataclass(frozen=True)
class Scaling:
    """Rows by the number of GPUs, and what they follow from.

    engine: of the first row. notes: what is not known, and therefore not counted.
    """

    engine: str
    gpu: Gpu
    network: Network
    gpus_per_node: int
    storage_bandwidth: float
    rows: tuple[ScaleRow, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything in plain types."""
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """A table for a terminal."""
        yield (
            f"{self.engine} on {self.gpu.name}, {self.gpus_per_node} in a node: {gigabytes(self.gpu.link_bandwidth)}/s "
            f"between GPUs of a node, {gigabytes(self.network.bandwidth)}/s ({self.network.name}) between nodes, "
            f"{gigabytes(self.storage_bandwidth)}/s of storage"
        )
        yield from table_lines(_HEADS, [_cells(row) for row in self.rows])
        yield ""
        yield from self.notes
        yield "A model (docs/scaling.md), not measured. Percentages are parts of a step."


def estimate_scaling(
    config: RunConfig, machine: Machine, numbers: Sequence[int], network: Network, storage_bandwidth: float
) -> Scaling:
    """Estimate a run on several numbers of GPUs.

    Args:
        config: of the run.
        machine: with a named GPU; its number of GPUs is not used.
        numbers: of GPUs.
        network: between nodes.
        storage_bandwidth: bytes a second of all ranks together.

    Raises:
        UserError: no GPU is named, or the engine moves weights or states through host memory, whose time is not known.
    """
    if machine.gpu is None:
        raise UserError("`--scale` needs `--gpu`, the name of a GPU whose kernels are timed.")
    model = _ScalingModel(config, machine, machine.gpu, network, storage_bandwidth)
    rows = tuple(model.row(number) for number in sorted(set(numbers)))
    engine = _sharding(config, max(numbers)).name
    return Scaling(
        engine, machine.gpu, network, machine.gpus_per_node, storage_bandwidth, rows, tuple(model.notes(rows))
    )


def exposed_seconds(collectives: Sequence[tuple[Collective, float]], compute: float) -> float:
    """Seconds of a pass's collectives that computation does not hide; each with the time that it takes."""
    hidden = [(one, seconds) for one, seconds in collectives if one.is_hidden]
    open_seconds = sum(seconds for one, seconds in collectives if not one.is_hidden)
    if not hidden:
        return open_seconds
    first = max(seconds / max(1.0, one.num_calls) for one, seconds in hidden)
    return open_seconds + first + max(0.0, sum(seconds for _, seconds in hidden) - first - compute)


class _ScalingModel:
    """Rows of one configuration, whose kernels are traced once."""

    def __init__(
        self, config: RunConfig, machine: Machine, gpu: Gpu, network: Network, storage_bandwidth: float
    ) -> None:
        self._config, self._machine, self._gpu = config, machine, gpu
        self._network, self._storage = network, storage_bandwidth
        sharding = _sharding(config, 1)
        if sharding.uses_host:
            raise UserError(
                f"`--scale` needs an engine whose weights and states are on the GPU, but {sharding.name} moves them "
                "through host memory, whose time is not estimated."
            )
        self._estimator = Estimator(config, Machine(1, machine.gpus_per_node, gpu=gpu, gpu_memory=machine.gpu_memory))
        self._times = TimeEstimator(self._estimator, sharding, gpu)
        self._roofline = Roofline(gpu, config.model.precision)
        workload = self._estimator.workload
        per_chunk = config.model.encoder_windows_per_chunk
        self._shapes = [computed_shape(shape, per_chunk) for shape in workload.probed]
        self._num_chunks = num_chunks(workload.typical.num_windows, per_chunk)
        fill = workload.data.window_fill if workload.data else 1.0
        self._audio_of_slot = workload.typical.num_windows * self._estimator.window_sizes.seconds * fill
        self._decoding_rate = decoding_rate(self._estimator, gpu)

    def row(self, num_gpus: int) -> ScaleRow:
        """The run on so many GPUs."""
        sharding = _sharding(self._config, num_gpus)
        machine = replace(self._estimator.machine, num_gpus=num_gpus)
        estimator, _ = estimator_with_chosen_checkpointing(self._estimator.with_machine(machine), sharding)
        config = estimator.config
        slots = max(config.train_data.slots_per_step, num_gpus)
        kernels = self._times.step(
            self._estimator.workload.typical, config.model.checkpointing, is_compiled=compiles_blocks(config)
        ).micro_batch
        communication = Communication(estimator.model, sharding, num_gpus, self._num_chunks)
        costs = list(map(estimator.flops.hardware, self._shapes))
        step, alone = self._step(sharding, communication, slots, kernels, costs)
        seconds = sum(step.values())
        audio = slots * self._audio_of_slot
        num_steps, run = self._run(sharding, num_gpus, slots, seconds)
        shares = step if run is None else {name: part * run["steps"] / seconds for name, part in step.items()}
        others = {} if run is None else {name: part for name, part in run.items() if name != "steps"}
        parts = shares | others
        _, peak = estimator.largest(sharding)
        memory = estimator.row(peak)
        return ScaleRow(
            num_gpus=num_gpus,
            slots_per_step=slots,
            step=step,
            step_seconds=seconds,
            audio_rate=audio / seconds,
            efficiency=audio / seconds / num_gpus / alone,
            bound=max(parts, key=lambda name: parts[name]),
            num_steps=num_steps,
            run=run,
            sent_bytes=communication.sent_bytes(-(-slots // num_gpus)),
            device_bytes=memory.device_bytes,
            fits=memory.fits,
        )

    def notes(self, rows: Sequence[ScaleRow]) -> Iterator[str]:
        """What is not counted, and what differs from the configuration."""
        workload, slots = self._estimator.workload, self._config.train_data.slots_per_step
        if not self._shapes:
            yield f"Lengths are not known, so no rank is slower than others: {workload.missing}"
        if any(row.slots_per_step > slots for row in rows):
            yield (
                f"The run has {counted(slots, 'slot')} in a step. More GPUs have one each: a larger global batch, with "
                "the same audio in fewer steps."
            )
        if self._config.evaluation.test_sets and workload.evaluation.audio_seconds is None:
            yield "Evaluations are not counted, because the test sets were not found."
        if any(row.run is None for row in rows):
            yield "The time of the run is not known: `num_epochs` needs the shards."

    def _step(
        self,
        sharding: Sharding,
        communication: Communication,
        slots: int,
        kernels: KernelTime,
        costs: Sequence[float],
    ) -> tuple[dict[str, float], float]:
        """Seconds of a step by part, and seconds of audio that a GPU trains on in a second alone."""
        num_gpus = communication.num_ranks
        rounds, one = -(-slots // num_gpus), kernels.seconds
        traffic = engine_traffic(self._estimator.model, sharding, self._config.optimizer, num_gpus)
        engine = self._roofline.traffic_seconds(traffic.step_bytes(rounds) + traffic.update)
        meets = not (isinstance(sharding, ZeroSharding) and sharding.stage < 2)
        slowest = slowest_rank(costs, slots, num_gpus, meets_in_micro_batches=meets)
        compute = one * slots / num_gpus + engine
        step = {
            "compute": compute,
            "idle ranks": one * (rounds - slots / num_gpus),
            "stragglers": one * (slowest - rounds),
            "communication": self._exposed(communication, rounds, kernels),
        }
        workers = max(1, self._config.train_data.num_workers)
        audio = slots * self._audio_of_slot
        read = max(
            rounds * self._audio_of_slot / (workers * _DECODED_BY_WORKER),
            audio * _STORED_BYTES_PER_SECOND / self._storage,
        )
        step["data"] = max(0.0, read - sum(step.values()))
        return step, audio / num_gpus / compute

    def _exposed(self, communication: Communication, rounds: int, kernels: KernelTime) -> float:
        """Seconds of communication in a step that ranks wait for."""
        links = Interconnect(self._gpu, self._network, min(communication.num_ranks, self._machine.gpus_per_node))
        timed = [(one, links.seconds(one)) for one in communication.micro_batch()]
        once = [(one, links.seconds(one)) for one in communication.once()]
        forward_seconds = kernels.by_phase.get("forward", 0.0)
        backward_seconds = kernels.seconds - forward_seconds
        forward = [pair for pair in timed if pair[0].moment == "forward pass"]
        backward = [pair for pair in timed if pair[0].moment == "backward pass"]
        last = backward + [pair for pair in once if pair[0].moment == "last backward pass"]
        update = sum(seconds for one, seconds in once if one.moment == "update")
        return (
            rounds * exposed_seconds(forward, forward_seconds)
            + (rounds - 1) * exposed_seconds(backward, backward_seconds)
            + exposed_seconds(last, backward_seconds)
            + update
        )

    def _run(
        self, sharding: Sharding, num_gpus: int, slots: int, step_seconds: float
    ) -> tuple[int | None, dict[str, float] | None]:
        """The number of steps, and seconds of steps, saves and evaluations."""
        config, workload = self._config, self._estimator.workload
        configured = workload.data.num_steps if workload.data else config.num_steps
        if configured is None:
            return None, None
        num_steps = -(-configured * config.train_data.slots_per_step // slots)
        every = config.evaluation.every_steps
        num_evaluations = 0 if not config.evaluation.test_sets else 1 if every is None else -(-num_steps // every)
        audio = workload.evaluation.audio_seconds or 0.0
        evaluations = num_evaluations * audio / (num_gpus * self._decoding_rate)
        saves = self._saves(sharding, num_gpus, num_steps, num_evaluations, step_seconds)
        return num_steps, {"steps": num_steps * step_seconds, "saves": saves, "evaluations": evaluations}

    def _saves(
        self, sharding: Sharding, num_gpus: int, num_steps: int, num_evaluations: int, step_seconds: float
    ) -> float:
        settings = self._config.checkpoint
        num_bytes = checkpoint_bytes(self._estimator.model, self._config.optimizer, sharding)
        written = num_bytes / self._storage
        num_waited = max(1, num_evaluations)
        num_background = max(0, num_steps // settings.every_steps - num_waited)
        if settings.asynchronous is False:
            return (num_waited + num_background) * written
        copied = num_bytes / num_gpus / _HOST_COPY_BANDWIDTH
        waits = max(0.0, written - settings.every_steps * step_seconds)
        return num_waited * (copied + written) + num_background * (copied + waits)


def _sharding(config: RunConfig, num_gpus: int) -> Sharding:
    """The sharding on so many ranks; fewer than a replica's share one."""
    fsdp2 = config.engine.fsdp2
    if fsdp2 is not None and fsdp2.ranks_per_replica is not None and num_gpus < fsdp2.ranks_per_replica:
        whole = config.engine.model_copy(update={"fsdp2": fsdp2.model_copy(update={"ranks_per_replica": None})})
        return configured_sharding(whole, num_gpus)
    return configured_sharding(config.engine, num_gpus)


_HEADS = (
    *("GPUs", "slots", "step", "audio s/s", "efficiency", "compute", "communication", "stragglers", "idle", "data"),
    *("bound by", "run", "saves", "evaluations", "fits"),
)


def _cells(row: ScaleRow) -> tuple[str, ...]:
    def share(name: str) -> str:
        return f"{100 * row.step[name] / row.step_seconds:.0f} %"

    def part(name: str) -> str:
        return duration(row.run[name]) if row.run is not None and row.run[name] else "-"

    return (
        str(row.num_gpus),
        str(row.slots_per_step),
        milliseconds(row.step_seconds),
        f"{row.audio_rate:,.0f}",
        f"{100 * row.efficiency:.0f} %",
        *(share(name) for name in ("compute", "communication", "stragglers", "idle ranks", "data")),
        row.bound,
        "-" if row.run_seconds is None else duration(row.run_seconds),
        part("saves"),
        part("evaluations"),
        {True: "yes", False: "no", None: "-"}[row.fits],
    )
