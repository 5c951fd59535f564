"""The report of `voxtral-dist plan`: whether a run fits, what it takes, and what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from voxtral_dist.config import RunConfig
from voxtral_dist.data.plan.train_plan import refuse_idle_ranks
from voxtral_dist.estimate.activations import MicroBatchShape
from voxtral_dist.estimate.advice import Change, advise
from voxtral_dist.estimate.estimator import Costs, Estimator, Machine, ShardingRow
from voxtral_dist.estimate.quantities import duration, gigabytes
from voxtral_dist.estimate.sharding import configured_sharding
from voxtral_dist.estimate.workload import Workload
from voxtral_dist.model.trainable import count_parameters, parameter_table


@dataclass(frozen=True)
class Estimate:
    """All that `voxtral-dist plan` says.

    shape: the micro-batch that decides the memory. configured: the run as it is configured. by_kind: bytes at its peak,
    in device and host memory of a rank. changes: where it does not fit, what to do, the cheapest first.
    """

    parameters: dict[str, dict[str, int]]
    parameter_lines: list[str]
    machine: Machine
    shape: MicroBatchShape
    workload: Workload
    configured: ShardingRow
    by_kind: dict[str, dict[str, float]]
    phases: dict[str, float]
    table: list[ShardingRow]
    changes: list[Change]
    costs: Costs

    def to_json(self) -> dict[str, Any]:
        """All of it in plain types; sizes in bytes."""
        tree = asdict(self)
        del tree["parameter_lines"]
        workload = tree.pop("workload")
        data = {key: workload[key] for key in ("source", "data", "missing")}
        unit = (
            "not yet measured on a GPU"
            if self.machine.device == "gpu"
            else "compared with CPU ranks under ZeRO (docs/benchmarks.md)"
        )
        return {**tree, "workload": data, "estimate_is": unit}

    def lines(self) -> Iterator[str]:
        """For a terminal."""
        yield from self.parameter_lines
        yield ""
        yield from self._memory_lines()
        yield ""
        yield from self._table_lines()
        if self.changes:
            yield ""
            yield "To make it fit, the cheapest first:"
            for change in self.changes:
                verdict = "fits" if change.fits else "does not fit alone"
                yield f"  {change.change}: {gigabytes(change.device_bytes)} ({verdict})"
        yield ""
        yield from self._cost_lines()

    def _memory_lines(self) -> Iterator[str]:
        shape, machine = self.shape, self.machine
        limit = "" if machine.gpu_memory is None else f" of {gigabytes(machine.gpu_memory)}"
        verdict = {True: ": it fits", False: ": IT DOES NOT FIT", None: ""}[self.configured.fits]
        label = "GPU" if machine.device == "gpu" else "rank"
        yield (
            f"{self.configured.name} on {machine.num_gpus} {label}s: {gigabytes(self.configured.device_bytes)}{limit} "
            f"for each {label}{verdict}"
        )
        yield (
            f"  decided by a micro-batch of {shape.num_examples} examples, {shape.num_windows} windows and "
            f"{shape.num_positions} positions each: {self.workload.source}"
        )
        yield f"  at its peak, in the {self.configured.peak_at}:"
        for kind, num_bytes in self.by_kind["device"].items():
            if num_bytes:
                yield f"    {kind:<17}{gigabytes(num_bytes):>10}"
        yield "  other moments: " + ", ".join(f"{name} {gigabytes(size)}" for name, size in self.phases.items())
        if self.configured.host_bytes_of_node:
            yield f"  host memory of a node: {gigabytes(self.configured.host_bytes_of_node)}"
        if machine.device == "gpu":
            yield "  These figures follow from formulas (docs/planning.md) and are not yet measured on a GPU."

    def _table_lines(self) -> Iterator[str]:
        heads = ("sharding", "each GPU", "host, node", "NVMe, node", "fits")
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
        widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(5)]
        for row in [heads, *rows]:
            yield "  ".join([row[0].ljust(widths[0]), *(row[column].rjust(widths[column]) for column in range(1, 5))])

    def _cost_lines(self) -> Iterator[str]:
        costs, data = self.costs, self.workload.data
        if data is None:
            yield f"Hours, passes and padding are left out: {self.workload.missing}"
        else:
            yield (
                f"{data.num_utterances} utterances, {data.hours_per_epoch:.1f} hours, {data.steps_per_epoch} steps an "
                f"epoch; {costs.num_steps} steps are {data.num_epochs:.2f} epochs of {data.target_tokens:.0f} target "
                f"tokens a step; audio fills {100 * data.window_fill:.0f} % of the windows, padding "
                f"{100 * data.padding:.0f} % of the positions"
            )
        yield (
            f"{costs.num_steps} steps of {costs.micro_batches_per_rank} micro-batches a rank: {costs.model_flops:.3g} "
            f"FLOPs of the model, {costs.hardware_flops:.3g} computed; about {duration(costs.seconds)} at "
            f"{100 * costs.mfu:.0f} % of {costs.peak_tflops:g} TFLOPS, without evaluations and saves"
        )
        if costs.idle:
            yield (
                f"ranks are idle for {100 * costs.idle:.0f} % of the time: make `train_data.slots_per_step` a multiple "
                f"of {self.machine.num_gpus}"
            )


def estimate_run(config: RunConfig, machine: Machine) -> Estimate:
    """The report of a configuration on a machine, within seconds and without its weights.

    Raises:
        UserError: the model's config.json is missing, or the configuration is not usable.
    """
    refuse_idle_ranks(config.train_data.slots_per_step, machine.num_gpus)
    sharding = configured_sharding(config, machine.num_gpus)
    estimator = Estimator(config, machine)
    largest = estimator.largest_shape(sharding)
    configured = estimator.estimate(sharding, largest)
    row = estimator.row(configured)
    counts = count_parameters(estimator.model)
    return Estimate(
        parameters={name: asdict(count) for name, count in counts.items()},
        parameter_lines=parameter_table(estimator.model),
        machine=machine,
        shape=largest,
        workload=estimator.workload,
        configured=row,
        by_kind={"device": configured.peak.device, "host": configured.peak.host},
        phases={phase.name: phase.device_bytes for phase in configured.phases},
        table=[estimator.row(estimator.estimate(one, largest)) for one in estimator.standard_shardings()],
        changes=advise(estimator, sharding) if row.fits is False else [],
        costs=estimator.costs(),
    )
