"""What a run measures, written to `metrics.jsonl` line by line, and shown while it happens."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from voxtral_dist.files import write_atomically

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from voxtral_dist.distributed.world import World

Kind = Literal["train", "evaluation", "checkpoint", "event"]

# Where there is no terminal, a line now and then takes the place of the live display.
_SECONDS_BETWEEN_LINES = 15.0


# A share of waiting for data that is worth a word.
_MUCH_WAITING = 0.05


@dataclass(frozen=True)
class StepMetrics:
    """What one update measured over all ranks.

    loss: the mean over target tokens, in nats.
    num_tokens: positions of the language model without padding.
    model_flops: floating point operations that the update needs; see `flops`.
    grad_norm: None where gradients overflowed in float16, so that the step was left out.
    step_seconds: with the time that was spent waiting for data.
    waiting_seconds: of them, on the rank that waited longest.
    memory_gigabytes: 10^9 bytes; the most that any rank had ever held before this update (`devices.peak_memory_bytes`).
    """

    loss: float
    num_target_tokens: int
    num_tokens: int
    audio_seconds: float
    model_flops: float
    learning_rate: float
    grad_norm: float | None
    step_seconds: float
    waiting_seconds: float
    memory_gigabytes: float

    def row(self, peak_flops: float | None) -> dict[str, float | int | None]:
        """What is measured and the rates that follow from it; `peak_flops` are those of all ranks together."""
        utilization = None if peak_flops is None else self.model_flops / self.step_seconds / peak_flops
        return asdict(self) | {
            "audio_seconds_per_second": self.audio_seconds / self.step_seconds,
            "target_tokens_per_second": self.num_target_tokens / self.step_seconds,
            "tokens_per_second": self.num_tokens / self.step_seconds,
            "model_flops_utilization": utilization,
        }


class MetricsLog:
    """Rank 0's record of the run and its live display; on other ranks every method does nothing."""

    def __init__(
        self,
        run_dir: Path,
        num_steps: int,
        first_step: int,
        world: World,
        peak_flops: float | None = None,
        with_tensorboard: bool = False,
    ) -> None:
        """Of a run that goes on after `first_step` updates; `peak_flops` are those of all ranks, where known."""
        self._is_first = world.is_first
        self._run_dir = run_dir
        self._path = run_dir / "metrics.jsonl"
        self._first_step = first_step
        self._peak_flops = peak_flops
        self._display = _Display(num_steps, first_step, peak_flops) if world.is_first else None
        self._with_tensorboard = with_tensorboard
        self._tensorboard: SummaryWriter | None = None

    def __enter__(self) -> Self:
        if self._display is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            drop_rows_after(self._path, self._first_step)
            self._file = self._path.open("a", encoding="utf-8")
            self._display.start()
            if self._with_tensorboard:
                self._tensorboard = self._open_tensorboard()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._display is not None:
            self._display.stop()
            self._file.close()

    def write(self, kind: Kind, step: int, values: dict[str, Any]) -> None:
        """Append one row. `step` is the number of updates made when it was measured."""
        if self._is_first:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}, ensure_ascii=False) + "\n")
            self._file.flush()
        if self._tensorboard is not None:
            _write_scalars(self._tensorboard, kind, step, values)

    def train_step(self, step: int, metrics: StepMetrics) -> None:
        """Append a `train` row and move the display on."""
        self.write("train", step, metrics.row(self._peak_flops))
        if self._display is not None:
            self._display.show(step, metrics)

    def say(self, line: str) -> None:
        """Print a line above the live display."""
        if self._display is not None:
            self._display.say(line)

    def _open_tensorboard(self) -> SummaryWriter | None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.say(
                "No scalars are written for TensorBoard: install its package by "
                "`pip install 'voxtral-dist[tensorboard]'`, or set `metrics.tensorboard` to false."
            )
            return None
        # What an earlier process wrote of later steps is hidden, as its rows are dropped.
        purge_step = self._first_step + 1 if self._first_step else 0
        return SummaryWriter(str(self._run_dir / "tensorboard"), purge_step=purge_step)


def _write_scalars(writer: SummaryWriter, kind: Kind, step: int, values: dict[str, Any]) -> None:
    if kind not in ("train", "evaluation"):
        return
    prefix = f"{kind}/{values['name']}" if "name" in values else kind
    for key, value in values.items():
        if isinstance(value, (int, float)):
            writer.add_scalar(f"{prefix}/{key}", value, step)
    # A killed process leaves as many scalars as rows.
    writer.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete rows; a last line that was cut by a kill is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def drop_rows_after(path: Path, step: int) -> None:
    """Forget what was measured after the checkpoint that the run goes on from, so that each step has one row.

    Without a checkpoint, at step 0, all is forgotten: it may be of another model, or of other test sets.
    """
    rows = [row for row in read_metrics(path) if row["step"] <= step] if step else []
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@dataclass
class _Recent:
    """Sums over the last steps, which count less and less; rates are their ratios."""

    steps: float = 0.0
    seconds: float = 0.0
    waiting_seconds: float = 0.0
    audio_seconds: float = 0.0
    model_flops: float = 0.0

    def after(self, metrics: StepMetrics, keep: float = 0.9) -> _Recent:
        """The sums with one step more."""
        return _Recent(
            keep * self.steps + 1.0,
            keep * self.seconds + metrics.step_seconds,
            keep * self.waiting_seconds + metrics.waiting_seconds,
            keep * self.audio_seconds + metrics.audio_seconds,
            keep * self.model_flops + metrics.model_flops,
        )

    def line(self, memory_gigabytes: float, peak_flops: float | None) -> str:
        """How fast it goes: audio, utilisation where it is known, memory, and waiting where it is much."""
        parts = [f"{self.audio_seconds / self.seconds:.0f} audio s/s"]
        if peak_flops is not None:
            parts.append(f"MFU {100 * self.model_flops / self.seconds / peak_flops:.1f} %")
        parts.append(f"{memory_gigabytes:.1f} GB")
        if self.waiting_seconds > _MUCH_WAITING * self.seconds:
            parts.append(f"waiting for data {100 * self.waiting_seconds / self.seconds:.0f} %")
        return "  ".join(parts)


class _Display:
    """A bar in a terminal, a line every few seconds elsewhere."""

    def __init__(self, num_steps: int, first_step: int, peak_flops: float | None) -> None:
        console = Console()
        self._is_live = console.is_terminal
        self._console = console
        self._num_steps = num_steps
        self._first_step = first_step
        self._peak_flops = peak_flops
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[rates]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not self._is_live,
            # Forked workers would inherit the redirection, and the lock inside it.
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._bar.add_task("train", total=num_steps, completed=first_step, loss="-", rates="")
        self._last_line = 0.0
        self._recent = _Recent()

    def start(self) -> None:
        self._bar.start()

    def stop(self) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def show(self, step: int, metrics: StepMetrics) -> None:
        if step == self._first_step + 2:
            # The first step of a process compiles and fills caches: its rates are shown, and then forgotten.
            self._recent = _Recent()
        self._recent = self._recent.after(metrics)
        rates = self._recent.line(metrics.memory_gigabytes, self._peak_flops)
        self._bar.update(self._task, completed=step, loss=f"{metrics.loss:.3f}", rates=rates)
        now = time.monotonic()
        if not self._is_live and (now - self._last_line > _SECONDS_BETWEEN_LINES or step == self._num_steps):
            self._last_line = now
            left = (self._num_steps - step) * self._recent.seconds / self._recent.steps
            self.say(f"step {step}/{self._num_steps}  loss {metrics.loss:.3f}  {rates}  left {left / 60:.1f} min")
