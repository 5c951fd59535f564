"""The factor of a float16 loss, which keeps small gradients above float16's smallest number."""

from __future__ import annotations

# Of an engine's `scalars`, the same for all engines: a run may go on under another one.
NUM_SKIPPED, SCALE, NUM_GOOD = "num_skipped_steps", "loss_scale", "num_good_steps"

_FIRST = 2.0**16
_LARGEST = 2.0**24
# Steps without an overflow after which a larger factor is tried.
_STEPS_TO_GROWTH = 2000


class LossScale:
    """A factor that doubles after many good steps and halves when a gradient overflows (arXiv 1710.03740)."""

    def __init__(self, num_steps_to_growth: int = _STEPS_TO_GROWTH) -> None:
        self.value = _FIRST
        self._num_good_steps = 0
        self._num_steps_to_growth = num_steps_to_growth

    @property
    def is_exhausted(self) -> bool:
        """Whether an overflow is none of float16's: gradients are not finite without a factor either."""
        return self.value <= 1.0

    def update(self, is_finite: bool) -> None:
        """Learn whether the gradients of a step were finite."""
        if not is_finite:
            self.value = max(1.0, self.value / 2)
            self._num_good_steps = 0
            return
        self._num_good_steps += 1
        if self._num_good_steps == self._num_steps_to_growth:
            self.value = min(_LARGEST, self.value * 2)
            self._num_good_steps = 0

    def scalars(self) -> dict[str, float]:
        """What the next updates depend on."""
        return {SCALE: self.value, NUM_GOOD: float(self._num_good_steps)}

    def load_scalars(self, scalars: dict[str, float]) -> None:
        """Take over what `scalars` gave; a run in another precision gave nothing."""
        self.value = scalars.get(SCALE, self.value)
        self._num_good_steps = int(scalars.get(NUM_GOOD, 0))
