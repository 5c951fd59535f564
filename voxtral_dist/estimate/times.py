"""Time of a run's kernels on a GPU: as configured, with and without checkpoints and compilation, and by batch size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from voxtral_dist.config import ActivationCheckpointingConfig, RunConfig
from voxtral_dist.engine.compilation import gains_by_compilation
from voxtral_dist.estimate.activations import MicroBatchShape
from voxtral_dist.estimate.engine_traffic import engine_traffic
from voxtral_dist.estimate.estimator import Estimator
from voxtral_dist.estimate.gpus import Gpu
from voxtral_dist.estimate.kernels import Kernel, compiled
from voxtral_dist.estimate.quantities import gigabytes, milliseconds, table_lines
from voxtral_dist.estimate.roofline import KernelTime, Roofline
from voxtral_dist.estimate.sharding import Sharding, ZeroSharding
from voxtral_dist.estimate.trace import StepTracer
from voxtral_dist.estimate.workload import clips
from voxtral_dist.model.encoder import num_chunks
from voxtral_dist.model.flops import BatchShape
from voxtral_dist.output.counting import counted

BATCH_SIZES = (1, 2, 4, 8, 16)
_NONE, _ALL = ActivationCheckpointingConfig(), ActivationCheckpointingConfig(encoder=1, language_model=1)


@dataclass(frozen=True)
class StepTime:
    """Time of the kernels of a step, in which each rank computes some micro-batches of one shape.

    checkpointing: `model.activation_checkpointing`. is_compiled: `model.compile_blocks`. micro_batch: the model's
    kernels. engine_seconds: what the engine copies and casts in all micro-batches. update_seconds: the update.
    clips_per_second: windows of audio (30 s) of all ranks. mfu: of the data sheet's rate. device_bytes: the peak of
    memory. fits: None without a limit.
    """

    shape: MicroBatchShape
    checkpointing: dict[str, int]
    is_compiled: bool
    micro_batch: KernelTime
    engine_seconds: float
    update_seconds: float
    step_seconds: float
    clips_per_second: float
    mfu: float
    device_bytes: float
    fits: bool | None

    @property
    def checkpoints(self) -> str:
        """Which activations are kept, in a word."""
        every = set(self.checkpointing.values())
        if every == {0}:
            return "kept"
        return "checkpointed" if every == {1} else "as configured"

    @property
    def blocks(self) -> str:
        """How blocks run, in a word."""
        return "compiled" if self.is_compiled else "eager"


@dataclass(frozen=True)
class Times:
    """Times of a run's kernels on a GPU.

    configured: the configured run, for its mean micro-batch. variants: the same with activations checkpointed or kept,
    compiled or not. batches: the configured run with micro-batches of some clips, `BATCH_SIZES`.
    num_micro_batches: of a rank in a step.
    """

    gpu: Gpu
    engine: str
    num_micro_batches: int
    configured: StepTime
    variants: tuple[StepTime, ...]
    batches: tuple[StepTime, ...]

    def lines(self) -> Iterator[str]:
        """The times as text for a terminal."""
        now, time = self.configured, self.configured.micro_batch
        yield (
            f"Time of kernels on {self.gpu.name} by a roofline, without communication, transfers to host memory and "
            "gaps between kernels:"
        )
        phases = ", ".join(f"{name} {milliseconds(seconds)}" for name, seconds in time.by_phase.items())
        bounds = sorted(time.by_bound.items(), key=lambda one: -one[1])
        yield (
            f"  a micro-batch of {counted(now.shape.num_examples, 'example')} and "
            f"{counted(now.shape.num_windows, 'window')} in {counted(now.shape.num_positions, 'position')}: "
            f"{milliseconds(time.seconds)} in {counted(time.num_kernels, 'kernel')} ({phases})"
        )
        parts = ", ".join(f"{name} {100 * seconds / time.seconds:.0f} %" for name, seconds in bounds)
        yield f"  bound by {parts}"
        yield (
            f"  a step with {self.num_micro_batches} per GPU: {milliseconds(now.step_seconds)}, of which casts and "
            f"copies of {self.engine} {milliseconds(now.engine_seconds)} and the update "
            f"{milliseconds(now.update_seconds)}; "
            f"{now.clips_per_second:.1f} clips/s, MFU {now.mfu:.2f}"
        )
        yield ""
        yield from table_lines(
            ("activations", "blocks", *_HEADS), [(one.checkpoints, one.blocks, *_cells(one)) for one in self.variants]
        )
        yield ""
        yield from table_lines(
            (f"clips, {now.checkpoints}, {now.blocks}", *_HEADS),
            [(str(one.shape.num_examples), *_cells(one)) for one in self.batches],
        )


class TimeEstimator:
    """Estimates step times of one configured run on one GPU.

    Each variant of the model is built once for its traces, and each shape of it is traced once.
    """

    def __init__(self, estimator: Estimator, sharding: Sharding, gpu: Gpu) -> None:
        self._estimator = estimator
        self._sharding = sharding
        self._roofline = Roofline(gpu, estimator.config.model.precision)
        self._gpu = gpu
        machine, config = estimator.machine, estimator.config
        self.num_micro_batches = -(-config.train_data.slots_per_step // machine.num_gpus)
        self._traffic = engine_traffic(estimator.model, sharding, config.optimizer, machine.num_gpus)
        self._variants: dict[tuple[int, int], tuple[Estimator, StepTracer]] = {}
        self._kernels: dict[tuple[int, int, MicroBatchShape], list[Kernel]] = {}

    def step(
        self, shape: MicroBatchShape, checkpointing: ActivationCheckpointingConfig, *, is_compiled: bool
    ) -> StepTime:
        """The time of a step whose micro-batches have this shape."""
        estimator, tracer = self._variant(checkpointing)
        key = (checkpointing.encoder, checkpointing.language_model, shape)
        if key not in self._kernels:
            self._kernels[key] = tracer.trace(shape)
        kernels = self._kernels[key]
        if is_compiled:
            per_chunk = estimator.config.model.encoder_windows_per_chunk
            kernels = compiled(kernels, num_chunks(shape.num_windows, per_chunk))
        time, count = self._roofline.time(kernels), self.num_micro_batches
        engine_seconds = self._roofline.traffic_seconds(self._traffic.step_bytes(count))
        update_seconds = self._roofline.traffic_seconds(self._traffic.update)
        step_seconds = count * time.seconds + engine_seconds + update_seconds
        needed = BatchShape.needed(
            shape.num_windows, [shape.num_positions] * shape.num_examples, shape.num_target_tokens
        )
        row = estimator.row(estimator.estimate(self._sharding, shape))
        rate = count * estimator.flops.model(needed) / step_seconds
        return StepTime(
            shape=shape,
            checkpointing=checkpointing.model_dump(),
            is_compiled=is_compiled,
            micro_batch=time,
            engine_seconds=engine_seconds,
            update_seconds=update_seconds,
            step_seconds=step_seconds,
            clips_per_second=count * shape.num_windows * estimator.machine.num_gpus / step_seconds,
            mfu=rate / self._gpu.peak_flops(estimator.config.model.precision),
            device_bytes=row.device_bytes,
            fits=row.fits,
        )

    def _variant(self, checkpointing: ActivationCheckpointingConfig) -> tuple[Estimator, StepTracer]:
        key = (checkpointing.encoder, checkpointing.language_model)
        if key not in self._variants:
            config = _checkpointed(self._estimator.config, checkpointing)
            tracer = StepTracer(config.model, config.trainable)
            self._variants[key] = (self._estimator.with_config(config), tracer)
        return self._variants[key]


def estimate_times(estimator: Estimator, sharding: Sharding, gpu: Gpu) -> Times:
    """The times of a run on a GPU; some seconds for the published models.

    Blocks are never compiled under ZeRO-3, which refuses it.
    """
    times, model = TimeEstimator(estimator, sharding, gpu), estimator.config.model
    typical, is_compiled = estimator.workload.typical, compiles_blocks(estimator.config)
    configured = times.step(typical, model.checkpointing, is_compiled=is_compiled)
    can_compile = not (isinstance(sharding, ZeroSharding) and sharding.stage == 3)
    choices = dict.fromkeys([_NONE, _ALL, model.checkpointing])
    return Times(
        gpu=gpu,
        engine=sharding.name,
        num_micro_batches=times.num_micro_batches,
        configured=configured,
        variants=tuple(
            times.step(typical, choice, is_compiled=compiles)
            for choice in choices
            for compiles in ([False, True] if can_compile else [False])
        ),
        batches=tuple(
            times.step(
                clips(size, estimator.window_sizes),
                model.checkpointing,
                is_compiled=is_compiled,
            )
            for size in BATCH_SIZES
        ),
    )


def configured_step_time(estimator: Estimator, sharding: Sharding, gpu: Gpu) -> StepTime:
    """The time of the configured run's steps on a GPU, for its mean micro-batch."""
    config = estimator.config
    times = TimeEstimator(estimator, sharding, gpu)
    return times.step(estimator.workload.typical, config.model.checkpointing, is_compiled=compiles_blocks(config))


def compiles_blocks(config: RunConfig) -> bool:
    """Whether blocks are compiled on a GPU of a machine with a compiler."""
    chosen = config.model.compile_blocks
    return gains_by_compilation(config) if chosen == "auto" else chosen


def _checkpointed(config: RunConfig, checkpointing: ActivationCheckpointingConfig) -> RunConfig:
    model = config.model.model_copy(update={"activation_checkpointing": checkpointing})
    return config.model_copy(update={"model": model})


_HEADS = ("kernels", "micro-batch", "step", "clips/s", "MFU", "per GPU", "fits")


def _cells(one: StepTime) -> tuple[str, ...]:
    return (
        str(one.micro_batch.num_kernels),
        milliseconds(one.micro_batch.seconds),
        milliseconds(one.step_seconds),
        f"{one.clips_per_second:.1f}",
        f"{one.mfu:.2f}",
        gigabytes(one.device_bytes),
        {True: "yes", False: "no", None: "-"}[one.fits],
    )
