"""Guards of the update: which updates are skipped, and when the run ends because of them."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Literal

from voxtral_dist.checkpoints.progress import GuardState
from voxtral_dist.config import OptimizerConfig
from voxtral_dist.engine.engine import StepUpdate

# Gradient norms behind the running median, and how many of them it needs.
NUM_NORMS, MIN_NORMS = 100, 20


@dataclass(frozen=True)
class Judgement:
    """What is unusual about an update.

    reason: the loss or the norm of the gradient is not finite, or the norm is a spike; None if nothing is.
    is_skipped: whether the update was not made for that reason.
    median: of the norms before; None where they are too few.
    """

    reason: Literal["loss", "gradient", "spike"] | None
    is_skipped: bool
    median: float | None


class Guards:
    """Judges each update by numbers that all ranks have, so that all of them judge alike.

    Norms of spikes count in the median too: gradients that stay large are no spikes for long.
    """

    def __init__(self, settings: OptimizerConfig, state: GuardState | None = None) -> None:
        """Continue from the state in a checkpoint."""
        self._settings = settings
        self.state = state or GuardState()

    def accepts(self, loss: float, grad_norm: float) -> bool:
        """Whether to make an update with this loss and finite norm."""
        return math.isfinite(loss) and not self._skips_spike(grad_norm)

    def judge(self, loss: float, update: StepUpdate) -> Judgement:
        """Judge an update that was made or not made, and remember it."""
        median = self._median()
        if not math.isfinite(loss):
            judgement = Judgement("loss", is_skipped=True, median=median)
        elif update.is_skipped:
            # An overflow of float16, which is usual.
            return Judgement(None, is_skipped=False, median=median)
        elif not math.isfinite(update.grad_norm):
            judgement = Judgement("gradient", is_skipped=True, median=median)
        elif self._is_spike(update.grad_norm):
            judgement = Judgement("spike", is_skipped=self._skips_spike(update.grad_norm), median=median)
        else:
            judgement = Judgement(None, is_skipped=False, median=median)
        self._remember(judgement, update.grad_norm)
        return judgement

    @property
    def must_end(self) -> bool:
        """Whether the run ends with the last update, because too many in a row were not finite."""
        return self.state.num_in_a_row > self._settings.max_skipped_in_a_row

    def _remember(self, judgement: Judgement, grad_norm: float) -> None:
        norms = self.state.grad_norms
        if judgement.reason in (None, "spike"):
            norms = (*norms, grad_norm)[-NUM_NORMS:]
        self.state = GuardState(
            num_skipped=self.state.num_skipped + judgement.is_skipped,
            num_in_a_row=self.state.num_in_a_row + 1 if judgement.is_skipped else 0,
            grad_norms=norms,
        )

    def _median(self) -> float | None:
        norms = self.state.grad_norms
        return statistics.median(norms) if len(norms) >= MIN_NORMS else None

    def _is_spike(self, grad_norm: float) -> bool:
        factor, median = self._settings.spike_factor, self._median()
        return factor is not None and median is not None and grad_norm > factor * median

    def _skips_spike(self, grad_norm: float) -> bool:
        has_skipped = self.state.num_in_a_row >= self._settings.max_skipped_in_a_row
        return self._settings.skip_spikes and not has_skipped and self._is_spike(grad_norm)
