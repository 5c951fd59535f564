"""The live display of a training run: loss, learning rate, error rates, throughput and memory of the last steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from voxtral_dist.config import SelectionConfig
from voxtral_dist.progress import ProgressDisplay
from voxtral_dist.training.outcome import telling_rate
from voxtral_dist.training.step_metrics import StepMetrics

# Waiting for data is shown above this fraction of the time.
_MIN_SHOWN_WAITING = 0.05
# The first test sets, whose last error rates are shown.
_NUM_SHOWN_SETS = 2
# Weight of the earlier steps in each new average.
_DECAY = 0.9


class TrainDisplay:
    """A `ProgressDisplay` over the steps of a run, with averages of recent steps."""

    def __init__(
        self, num_steps: int, first_step: int, peak_flops: float | None, selection: SelectionConfig | None = None
    ) -> None:
        """Start after `first_step` updates.

        Args:
            num_steps: updates in total.
            first_step: updates that earlier processes made.
            peak_flops: of all ranks together, where known.
            selection: names the error rates of its test sets.
        """
        self._progress = ProgressDisplay("step", num_steps, completed=first_step, note="loss -")
        self._num_steps = num_steps
        self._first_step = first_step
        self._peak_flops = peak_flops
        self._selection = selection
        self._recent = _RecentSteps()
        self._rates: dict[str, str] = {}

    def start(self) -> None:
        """Show the bar."""
        self._progress.__enter__()

    def stop(self) -> None:
        """Leave the bar as it is."""
        self._progress.__exit__(None, None, None)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._progress.say(line)

    def evaluated(self, row: Mapping[str, Any]) -> None:
        """Remember the error rate of a row of kind `evaluation`, which the steps after it show."""
        metric = telling_rate(row, self._selection.metric_of(row["name"]) if self._selection else None)
        rate = row.get(metric)
        self._rates[row["name"]] = "-" if rate is None else f"{metric.upper()} {100 * rate:.1f} %"

    def show(self, step: int, metrics: StepMetrics) -> None:
        """Show that `step` updates were made."""
        if step == self._first_step + 2:
            # The first step of a process compiles and fills caches, so it does not count in averages.
            self._recent = _RecentSteps()
        self._recent = self._recent.after(metrics)
        loss = "-" if metrics.loss is None else f"{metrics.loss:.3f}"
        rates = [f"{name} {rate}" for name, rate in list(self._rates.items())[:_NUM_SHOWN_SETS]]
        parts = [f"loss {loss}", f"lr {metrics.learning_rate:.1e}", *rates]
        note = "  ".join([*parts, self._recent.rates(metrics.memory_gigabytes, self._peak_flops)])
        self._progress.show(step, note, seconds_left=(self._num_steps - step) * self._recent.seconds_per_step)


@dataclass(frozen=True)
class _RecentSteps:
    """Exponentially decaying sums over recent steps; rates are their ratios."""

    steps: float = 0.0
    seconds: float = 0.0
    waiting_seconds: float = 0.0
    audio_seconds: float = 0.0
    model_flops: float = 0.0

    def after(self, metrics: StepMetrics) -> _RecentSteps:
        """The sums with one more step."""
        return _RecentSteps(
            _DECAY * self.steps + 1.0,
            _DECAY * self.seconds + metrics.step_seconds,
            _DECAY * self.waiting_seconds + metrics.waiting_seconds,
            _DECAY * self.audio_seconds + metrics.audio_seconds,
            _DECAY * self.model_flops + metrics.model_flops,
        )

    @property
    def seconds_per_step(self) -> float:
        return self.seconds / self.steps

    def rates(self, memory_gigabytes: float, peak_flops: float | None) -> str:
        """Throughput, utilization where the peak is known, memory, and the wait for data where it matters."""
        parts = [f"{self.audio_seconds / self.seconds:.0f} audio s/s"]
        if peak_flops is not None:
            parts.append(f"MFU {100 * self.model_flops / self.seconds / peak_flops:.1f} %")
        parts.append(f"{memory_gigabytes:.1f} GB")
        if self.waiting_seconds > _MIN_SHOWN_WAITING * self.seconds:
            parts.append(f"waiting for data {100 * self.waiting_seconds / self.seconds:.0f} %")
        return "  ".join(parts)
