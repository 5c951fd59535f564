"""The estimate that `voxtral-dist plan` prints: whether a run fits, what it costs, and what would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from voxtral_dist.config import RunConfig
from voxtral_dist.data.plan.train_plan import refuse_idle_ranks
from voxtral_dist.errors import UserError
from voxtral_dist.estimate.advice import Change, advise
from voxtral_dist.estimate.checkpointing import estimator_with_chosen_checkpointing
from voxtral_dist.estimate.estimator import Costs, Estimator, Machine, ShardingRow
from voxtral_dist.estimate.quantities import gigabytes, table_lines
from voxtral_dist.estimate.run_memory import RunMemory
from voxtral_dist.estimate.sharding import configured_sharding
from voxtral_dist.estimate.times import Times, estimate_times
from voxtral_dist.estimate.workload import Workload
from voxtral_dist.model.trainable import count_parameters, parameter_table
from voxtral_dist.output.counting import counted
from voxtral_dist.output.duration import duration


@dataclass(frozen=True)
class Estimate:
    """The estimate of a run.

    parameters, parameter_lines: of each component. memory: as configured. table: the standard shardings. changes: what
    to change if it does not fit, the cheapest first. times: None unless the GPU is named.
    """

    parameters: dict[str, dict[str, int]]
    parameter_lines: list[str]
    workload: Workload
    memory: RunMemory
    table: list[ShardingRow]
    changes: list[Change]
    times: Times | None
    costs: Costs

    def to_json(self) -> dict[str, Any]:
        """The estimate in plain types; sizes in bytes."""
        tree = asdict(self)
        del tree["parameter_lines"], tree["memory"]
        workload, memory = tree.pop("workload"), self.memory.to_json()
        del memory["source"]
        data = {key: workload[key] for key in ("source", "data", "missing")}
        unit = (
            "not yet measured on a GPU"
            if self.memory.machine.device == "gpu"
            else "compared with CPU ranks under ZeRO (docs/benchmarks.md)"
        )
        return {**memory, **tree, "workload": data, "estimate_is": unit}

    def lines(self) -> Iterator[str]:
        """The estimate as text for a terminal."""
        yield from self.parameter_lines
        yield ""
        yield from self.memory.lines()
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

    def _table_lines(self) -> Iterator[str]:
        label = "GPU" if self.memory.machine.device == "gpu" else "rank"
        heads = ("sharding", f"per {label}", "host, per node", "NVMe, per node", "fits")
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
                f"of {self.memory.machine.num_gpus}"
            )

    @property
    def _duration(self) -> str:
        costs = self.costs
        if costs.seconds is None:
            named = "name the GPU, as in --gpu H100, or " if self.memory.machine.device == "gpu" else ""
            return f"for their time {named}give --mfu and --peak-tflops"
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
    estimator = Estimator(config, machine)
    on_stage(1)
    estimator, checkpointing = estimator_with_chosen_checkpointing(estimator, sharding)
    memory = RunMemory.of(estimator, sharding, checkpointing)
    counts = count_parameters(estimator.model)
    on_stage(2)
    times = None if machine.gpu is None else estimate_times(estimator, sharding, machine.gpu)
    on_stage(3)
    table = [estimator.row(estimator.estimate(one, memory.shape)) for one in estimator.standard_shardings()]
    on_stage(4)
    return Estimate(
        parameters={name: asdict(count) for name, count in counts.items()},
        parameter_lines=parameter_table(estimator.model),
        workload=estimator.workload,
        memory=memory,
        table=table,
        changes=advise(estimator, sharding) if memory.configured.fits is False else [],
        times=times,
        costs=estimator.costs(None if times is None else times.configured.mfu),
    )
