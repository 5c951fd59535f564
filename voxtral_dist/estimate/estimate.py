"""The estimate that `voxtral-dist plan` prints: whether a run fits, what it costs, and what would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from voxtral_dist.config import RunConfig
from voxtral_dist.data.plan.train_plan import refuse_idle_ranks
from voxtral_dist.errors import UserError
from voxtral_dist.estimate.activations import MicroBatchShape
from voxtral_dist.estimate.advice import Change, advise
from voxtral_dist.estimate.checkpointing import ChosenCheckpointing, checkpointing_for
from voxtral_dist.estimate.estimator import Costs, Estimator, Machine, ShardingRow
from voxtral_dist.estimate.quantities import gigabytes, table_lines
from voxtral_dist.estimate.sharding import Sharding, configured_sharding
from voxtral_dist.estimate.state_bytes import checkpoint_bytes
from voxtral_dist.estimate.times import Times, estimate_times
from voxtral_dist.estimate.workload import Workload
from voxtral_dist.model.trainable import count_parameters, parameter_table
from voxtral_dist.output.counting import counted
from voxtral_dist.output.duration import duration


@dataclass(frozen=True)
class Decoding:
    """How evaluations decode.

    decoding_bytes: of a rank, besides weights. gathers_weights: see `MemoryEstimate`. source: how batches were found.
    """

    decoding_bytes: int
    gathers_weights: bool | None
    source: str

    @property
    def line(self) -> str:
        """The memory and the weights of evaluations."""
        weights = {True: "gathered on each rank", False: "sharded, all ranks in lockstep", None: "not sharded"}
        return (
            f"evaluation: weights {weights[self.gathers_weights]}; decoding needs {gigabytes(self.decoding_bytes)} "
            f"({self.source})"
        )


@dataclass(frozen=True)
class Estimate:
    """The estimate of a run.

    parameters, parameter_lines: of each component. shape: the micro-batch with the highest peak. configured: the
    configured sharding. by_kind: its bytes by kind, on a rank's device and in a node's host memory, each at its own
    peak. phases, host_phases: its bytes on a rank's device, and in a node's host memory, in each phase.
    checkpoint_copy_bytes: of a node's host memory, which a checkpoint in the background takes beside those of phases; 0
    if none is made. decoding: None without test sets. table: the standard shardings. changes: what to change if it does
    not fit, the cheapest first. times: None unless the GPU is named. checkpointing: what `activation_checkpointing:
    auto` has become; None where it was not asked for.
    """

    parameters: dict[str, dict[str, int]]
    parameter_lines: list[str]
    machine: Machine
    shape: MicroBatchShape
    workload: Workload
    configured: ShardingRow
    checkpointing: ChosenCheckpointing | None
    by_kind: dict[str, dict[str, float]]
    phases: dict[str, float]
    host_phases: dict[str, float]
    checkpoint_copy_bytes: float
    decoding: Decoding | None
    table: list[ShardingRow]
    changes: list[Change]
    times: Times | None
    costs: Costs

    def to_json(self) -> dict[str, Any]:
        """The estimate in plain types; sizes in bytes."""
        tree = asdict(self)
        del tree["parameter_lines"]
        workload = tree.pop("workload")
        if self.checkpointing:
            tree["checkpointing"]["checkpointing"] = self.checkpointing.checkpointing.model_dump()
        data = {key: workload[key] for key in ("source", "data", "missing")}
        unit = (
            "not yet measured on a GPU"
            if self.machine.device == "gpu"
            else "compared with CPU ranks under ZeRO (docs/benchmarks.md)"
        )
        return {**tree, "workload": data, "estimate_is": unit}

    def lines(self) -> Iterator[str]:
        """The estimate as text for a terminal."""
        yield from self.parameter_lines
        yield ""
        yield from self.memory_lines()
        yield ""
        yield from self._table_lines()
        if self.changes:
            yield ""
            yield "To make it fit, the cheapest first:"
            for change in self.changes:
                verdict = "fits" if change.fits else "not enough alone"
                yield f"  {change.change}: {gigabytes(change.device_bytes)} ({verdict})"
        yield ""
        if self.times:
            yield from self.times.lines()
            yield ""
        yield from self._cost_lines()

    def memory_lines(self) -> Iterator[str]:
        """The memory of the configured sharding as text, and whether it fits."""
        shape, machine = self.shape, self.machine
        limit = "" if machine.gpu_memory is None else f" of {gigabytes(machine.gpu_memory)}"
        verdict = {True: ": it fits", False: ": IT DOES NOT FIT", None: ""}[self.configured.fits]
        label = "GPU" if machine.device == "gpu" else "rank"
        yield (
            f"{self.configured.name} on {counted(machine.num_gpus, label)}: "
            f"{gigabytes(self.configured.device_bytes)}{limit} per {label}{verdict}"
        )
        yield (
            f"  for a micro-batch of {counted(shape.num_examples, 'example')} and "
            f"{counted(shape.num_windows, 'window')}, padded to {counted(shape.num_positions, 'position')}: "
            f"{self.workload.source}"
        )
        yield f"  peak, in the {self.configured.peak_at}:"
        for kind, num_bytes in self.by_kind["device"].items():
            if num_bytes:
                yield f"    {kind:<17}{gigabytes(num_bytes):>10}"
        yield "  all phases: " + ", ".join(f"{name} {gigabytes(size)}" for name, size in self.phases.items())
        if self.checkpointing:
            yield f"  {self.checkpointing.line}"
        if self.decoding:
            yield f"  {self.decoding.line}"
        if self.configured.host_bytes_of_node:
            yield from self._host_lines()
        if self.checkpoint_copy_bytes:
            yield (
                f"  a checkpoint in the background: {gigabytes(self.checkpoint_copy_bytes)} more of host memory per "
                "node, from the first one on (`checkpoint.asynchronous`)"
            )
        if machine.device == "gpu":
            yield "  These numbers follow from formulas (docs/planning.md) and are not yet measured on a GPU."

    def _host_lines(self) -> Iterator[str]:
        row = self.configured
        if self.machine.device == "cpu":
            yield f"  host memory per node: {gigabytes(row.host_bytes_of_node)}"
            return
        yield f"  host memory per node: {gigabytes(row.host_bytes_of_node)}; peak, in the {row.host_peak_at}:"
        for kind, num_bytes in self.by_kind["host"].items():
            if num_bytes:
                yield f"    {kind:<19}{gigabytes(num_bytes):>10}"
        yield "  all phases: " + ", ".join(f"{name} {gigabytes(size)}" for name, size in self.host_phases.items())

    def _table_lines(self) -> Iterator[str]:
        heads = ("sharding", "per GPU", "host, per node", "NVMe, per node", "fits")
        rows = [
            (
                row.name,
                gigabytes(row.device_bytes),
                gigabytes(row.host_bytes_of_node) if row.host_bytes_of_node else "-",
                gigabytes(row.nvme_bytes_of_node) if row.nvme_bytes_of_node else "-",
                {True: "yes", False: "no", None: "-"}[row.fits],
            )
            for row in self.table
        ]
        yield from table_lines(heads, rows)

    def _cost_lines(self) -> Iterator[str]:
        costs, data = self.costs, self.workload.data
        if data is None:
            unknown = "Hours, epochs and padding" if costs.num_steps else "Steps, hours and padding"
            yield f"{unknown} are unknown: {self.workload.missing}"
            typical = self.workload.typical
            targets = typical.num_target_tokens / typical.num_windows
            yield f"FLOPs and time are those of full windows with {counted(targets, 'target token', '.0f')} each"
        else:
            yield (
                f"{counted(data.num_utterances, 'utterance')}, {data.hours_per_epoch:.1f} hours, "
                f"{counted(data.steps_per_epoch, 'step')} per epoch; {counted(data.num_steps, 'step')}: "
                f"{data.num_epochs:.2f} epochs with {counted(data.target_tokens, 'target token', '.0f')} per step; "
                f"audio fills {100 * data.window_fill:.0f} % of the windows, {100 * data.padding:.0f} % of the "
                "positions are padding"
            )
        steps = counted(costs.num_steps, "step") if costs.num_steps else "one step"
        yield (
            f"{steps} of {counted(costs.micro_batches_per_rank, 'micro-batch', plural='micro-batches')} per rank: "
            f"{costs.model_flops:.3g} model FLOPs, {costs.hardware_flops:.3g} hardware FLOPs; {self._duration}"
        )
        if costs.idle:
            yield (
                f"ranks are idle {100 * costs.idle:.0f} % of the time: set `train_data.slots_per_step` to a multiple "
                f"of {self.machine.num_gpus}"
            )

    @property
    def _duration(self) -> str:
        costs = self.costs
        if costs.seconds is None:
            return "for their time name the GPU, as in --gpu H100, or give --mfu and --peak-tflops"
        source = "by the roofline" if costs.is_roofline else "as given"
        return (
            f"about {duration(costs.seconds)} at an MFU of {100 * (costs.mfu or 0):.0f} % of {costs.peak_tflops:g} "
            f"TFLOPS ({source}), without evaluations and checkpoints"
        )


# The parts of an estimate, in the order of their computation.
STAGES = ("model and data", "memory", "time", "other shardings", "what to change")


def estimate_run(config: RunConfig, machine: Machine, on_stage: Callable[[int], None] = lambda _: None) -> Estimate:
    """Estimate a run on a machine, within seconds and without the model's weights.

    Args:
        config: of the run.
        machine: that the run is to start on.
        on_stage: called with the place in `STAGES` of each part before it is computed.

    Raises:
        UserError: the model's config.json is missing, or the configuration is not usable.
    """
    refuse_idle_ranks(config.train_data.slots_per_step, machine.num_gpus)
    if config.model.float8 == "rowwise" and machine.gpu is not None and machine.gpu.float8_peak_flops is None:
        raise UserError(
            f"`model.float8: rowwise` is not possible on {machine.gpu.name}, which does not multiply float8: remove "
            "it, or name another --gpu."
        )
    sharding = configured_sharding(config.engine, machine.num_gpus)
    on_stage(0)
    config, checkpointing = checkpointing_for(config, machine)
    estimator = Estimator(config, machine)
    on_stage(1)
    largest = estimator.largest_shape(sharding)
    configured = estimator.estimate(sharding, largest)
    row = estimator.row(configured)
    ranks = machine.ranks_of_node
    counts = count_parameters(estimator.model)
    on_stage(2)
    times = None if machine.gpu is None else estimate_times(estimator, sharding, machine.gpu)
    on_stage(3)
    table = [estimator.row(estimator.estimate(one, largest)) for one in estimator.standard_shardings()]
    on_stage(4)
    return Estimate(
        parameters={name: asdict(count) for name, count in counts.items()},
        parameter_lines=parameter_table(estimator.model),
        machine=machine,
        shape=largest,
        workload=estimator.workload,
        configured=row,
        checkpointing=checkpointing,
        by_kind={"device": dict(configured.peak.device), "host": configured.host_peak(ranks).host_kinds_of_node(ranks)},
        phases={phase.name: phase.device_bytes for phase in configured.phases},
        host_phases={phase.name: phase.host_bytes_of_node(ranks) for phase in configured.phases},
        checkpoint_copy_bytes=_checkpoint_copy_bytes(config, estimator, sharding),
        decoding=_decoding(estimator, configured.gathers_weights),
        table=table,
        changes=advise(estimator, sharding) if row.fits is False else [],
        times=times,
        costs=estimator.costs(None if times is None else times.configured.mfu),
    )


def _checkpoint_copy_bytes(config: RunConfig, estimator: Estimator, sharding: Sharding) -> float:
    if config.checkpoint.asynchronous is False:
        return 0.0
    whole = checkpoint_bytes(estimator.model, config.optimizer, sharding)
    return whole * estimator.machine.ranks_of_node / estimator.machine.num_gpus


def _decoding(estimator: Estimator, gathers_weights: bool | None) -> Decoding | None:
    if not estimator.decoding_bytes:
        return None
    return Decoding(estimator.decoding_bytes, gathers_weights, estimator.workload.evaluation.source)
