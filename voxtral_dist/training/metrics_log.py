"""The record of a run: rows in `metrics.jsonl`, scalars for TensorBoard, and the live display."""

from __future__ import annotations

import errno
import json
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from voxtral_dist.checkpoints.directory import checkpoint_folder
from voxtral_dist.config import SelectionConfig
from voxtral_dist.distributed.collectives import from_first_rank
from voxtral_dist.distributed.world import World
from voxtral_dist.files import write_errors_named
from voxtral_dist.output.counting import counted
from voxtral_dist.output.masking import masked
from voxtral_dist.training.display import TrainDisplay
from voxtral_dist.training.incidents import Incident
from voxtral_dist.training.metrics_endpoint import MetricsEndpoint
from voxtral_dist.training.metrics_file import DAMAGED_FILE, drop_rows_after, parse_row
from voxtral_dist.training.step_metrics import StepMetrics
from voxtral_dist.training.tensorboard import open_writer, write_scalars

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Kind = Literal["train", "evaluation", "checkpoint", "event"]
# Rows of a kind, and events of a name, that a run looks up again. All others may be many, and are only written.
LookedUp = Literal["evaluation", "checkpoint", "selection", "uploaded"]


class MetricsLog:
    """Rank 0's record of the run and its live display. On other ranks it records and shows nothing."""

    def __init__(
        self,
        run_dir: Path,
        num_steps: int,
        first_step: int,
        world: World,
        peak_flops: float | None = None,
        with_tensorboard: bool = False,
        endpoint: MetricsEndpoint | None = None,
        selection: SelectionConfig | None = None,
    ) -> None:
        """Prepare the record of a run that continues after `first_step` updates.

        Args:
            run_dir: the folder of `metrics.jsonl`.
            num_steps: updates in total.
            first_step: updates that earlier processes made; their later rows are dropped.
            world: all ranks.
            peak_flops: operations per second of all ranks together; None where unknown, so that no utilization is
                recorded.
            with_tensorboard: also write scalars, where the package is installed.
            endpoint: of this host, on the rank that serves it.
            selection: names the error rates that the display shows of its test sets.
        """
        self._world = world
        self._run_dir = run_dir
        self._path = run_dir / "metrics.jsonl"
        self._first_step = first_step
        self._peak_flops = peak_flops
        self._display = TrainDisplay(num_steps, first_step, peak_flops, selection) if world.is_first else None
        self._with_tensorboard = with_tensorboard
        self._tensorboard: SummaryWriter | None = None
        self._looked_up: dict[str, list[dict[str, Any]]] = {name: [] for name in get_args(LookedUp)}
        self._endpoint = endpoint
        if endpoint is not None:
            endpoint.begin(num_steps, first_step, _saved_at(run_dir, first_step))

    def __enter__(self) -> Self:
        if self._display is not None:
            num_damaged = self._open()
            for row in self._looked_up["evaluation"]:
                self._display.evaluated(row)
            self._display.start()
            if num_damaged:
                self.say(
                    f"Moved {counted(num_damaged, 'damaged line')} of {self._path} to {DAMAGED_FILE} beside it, so "
                    "curves and reports lack them."
                )
            if self._with_tensorboard:
                self._open_tensorboard()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What could not be written has been said.
        if self._tensorboard is not None:
            with suppress(OSError):
                self._tensorboard.close()
        if self._display is not None:
            self._display.stop()
            with suppress(OSError):
                self._file.close()

    def write(self, kind: Kind, step: int, values: dict[str, Any]) -> None:
        """Append one row; `step` is the number of updates before it.

        Raises:
            WriteError: on rank 0; the disk is full, or `run_dir` is gone.
        """
        if self._endpoint is not None and kind == "checkpoint":
            self._endpoint.record_checkpoint(step, time.time())
        if not self._world.is_first:
            return
        self.refuse_if_gone()
        line = masked(json.dumps({"kind": kind, "step": step, **values}, ensure_ascii=False))
        with write_errors_named("The metrics", self._path):
            self._file.write(line + "\n")
            self._file.flush()
            if self._tensorboard is not None:
                write_scalars(self._tensorboard, kind, step, values)
        # What a resumed run would read.
        if kind != "train" and (row := parse_row(line.encode())) is not None:
            self._remember(row)
        if self._display is not None and kind == "evaluation":
            self._display.evaluated(values)

    def refuse_if_gone(self) -> None:
        """Refuse to go on without the file: rows that are written to a removed one are lost without an error.

        Raises:
            WriteError: on rank 0; somebody removed or moved `run_dir`.
        """
        if self._world.is_first:
            with write_errors_named("The metrics", self._path):
                if not self._path.exists():
                    raise OSError(errno.ENOENT, "the file is gone, because somebody has removed or moved it")

    def train_step(self, step: int, metrics: StepMetrics) -> None:
        """Append a row of kind `train` and update the display."""
        row = metrics.row(self._peak_flops)
        self.write("train", step, row)
        if self._endpoint is not None:
            self._endpoint.record_step(step, row)
        if self._display is not None:
            self._display.show(step, metrics)

    def incident(self, step: int, incident: Incident | None) -> None:
        """Record and print what was unusual about an update, if anything was."""
        if incident is not None:
            self.write("event", step, incident.event)
            self.say(str(incident))

    def say(self, line: str) -> None:
        """Print a line above the live display."""
        if self._display is not None:
            self._display.say(line)

    def rows(self, name: LookedUp) -> list[dict[str, Any]]:
        """The rows of a kind, or the events of a name, so far. All ranks call it together and get rank 0's."""
        return from_first_rank(list(self._looked_up[name]), self._world)

    def _open(self) -> int:
        """Open the file for more rows, and remember those of earlier processes; returns the number of damaged lines."""
        with write_errors_named("The metrics", self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            earlier = drop_rows_after(self._path, self._first_step)
            self._file = self._path.open("a", encoding="utf-8")
        for row in earlier.rows:
            self._remember(row)
        return len(earlier.damaged)

    def _remember(self, row: dict[str, Any]) -> None:
        name = row.get("event") if row["kind"] == "event" else row["kind"]
        if name in self._looked_up:
            self._looked_up[name].append(row)

    def _open_tensorboard(self) -> None:
        self._tensorboard = open_writer(self._run_dir, self._first_step)
        if self._tensorboard is None:
            self.say(
                "No scalars are written for TensorBoard: install its package by "
                "`pip install 'voxtral-dist[tensorboard]'`, or set `metrics.tensorboard` to false."
            )


def _saved_at(run_dir: Path, step: int) -> float | None:
    """The time of the checkpoint of a step; None if there is none."""
    try:
        return checkpoint_folder(run_dir, step).stat().st_mtime
    except FileNotFoundError:
        return None
