"""What a run measures, written to `metrics.jsonl` line by line, and shown while it happens."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from voxtral_dist.distributed.world import World

Kind = Literal["train", "evaluation", "checkpoint", "event"]

# Where there is no terminal, a line now and then takes the place of the live display.
_SECONDS_BETWEEN_LINES = 15.0


@dataclass(frozen=True)
class StepMetrics:
    """One `train` row: sums and means over all ranks. `loss` is the mean over target tokens, in nats."""

    loss: float
    num_target_tokens: int
    audio_seconds: float
    learning_rate: float
    grad_norm: float
    step_seconds: float


class MetricsLog:
    """Rank 0's record of the run and its live display; on other ranks every method does nothing."""

    def __init__(self, run_dir: Path, num_steps: int, first_step: int, world: World) -> None:
        self._is_first = world.is_first
        self._path = run_dir / "metrics.jsonl"
        self._first_step = first_step
        self._display = _Display(num_steps, first_step) if world.is_first else None

    def __enter__(self) -> Self:
        if self._display is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            drop_rows_after(self._path, self._first_step)
            self._file = self._path.open("a", encoding="utf-8")
            self._display.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._display is not None:
            self._display.stop()
            self._file.close()

    def write(self, kind: Kind, step: int, values: dict[str, Any]) -> None:
        """Append one row. `step` is the number of updates made when it was measured."""
        if self._is_first:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}, ensure_ascii=False) + "\n")
            self._file.flush()

    def train_step(self, step: int, metrics: StepMetrics) -> None:
        """Append a `train` row and move the display on."""
        self.write("train", step, asdict(metrics))
        if self._display is not None:
            self._display.show(step, metrics)

    def say(self, line: str) -> None:
        """Print a line above the live display."""
        if self._display is not None:
            self._display.say(line)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete rows; a last line that was cut by a kill is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def drop_rows_after(path: Path, step: int) -> None:
    """Forget what was measured after the checkpoint that the run goes on from, so that each step has one row."""
    rows = [row for row in read_metrics(path) if row["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(path)


class _Display:
    """A bar in a terminal, a line every few seconds elsewhere."""

    def __init__(self, num_steps: int, first_step: int) -> None:
        console = Console()
        self._is_live = console.is_terminal
        self._console = console
        self._num_steps = num_steps
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[rate]} audio s/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not self._is_live,
            # Forked workers would inherit the redirection, and the lock inside it.
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._bar.add_task("train", total=num_steps, completed=first_step, loss="-", rate="-")
        self._last_line = 0.0
        self._rate = 0.0
        self._seconds_per_step = 0.0

    def start(self) -> None:
        self._bar.start()

    def stop(self) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def show(self, step: int, metrics: StepMetrics) -> None:
        self._rate = _smooth(self._rate, metrics.audio_seconds / metrics.step_seconds)
        self._seconds_per_step = _smooth(self._seconds_per_step, metrics.step_seconds)
        self._bar.update(self._task, completed=step, loss=f"{metrics.loss:.3f}", rate=f"{self._rate:.0f}")
        now = time.monotonic()
        if not self._is_live and (now - self._last_line > _SECONDS_BETWEEN_LINES or step == self._num_steps):
            self._last_line = now
            left = (self._num_steps - step) * self._seconds_per_step
            self.say(
                f"step {step}/{self._num_steps}  loss {metrics.loss:.3f}  {self._rate:.0f} audio s/s  "
                f"left {left / 60:.1f} min"
            )


def _smooth(mean: float, value: float, weight: float = 0.1) -> float:
    return value if mean == 0.0 else (1.0 - weight) * mean + weight * value
