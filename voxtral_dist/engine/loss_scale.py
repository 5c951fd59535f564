"""Dynamic loss scaling for float16, which keeps small gradients above float16's smallest number."""

from __future__ import annotations

# Names in `Engine.scalars`, common to all engines, because a run may resume with another engine.
NUM_SKIPPED, SCALE, NUM_GOOD = "num_skipped_steps", "loss_scale", "num_good_steps"

_FIRST = 2.0**16
_LARGEST = 2.0**24
# Steps without an overflow after which the scale is doubled.
_STEPS_TO_GROWTH = 2000


class LossScale:
    """A factor of the loss that doubles after many good steps and halves on overflow (arXiv 1710.03740)."""

    def __init__(self, num_steps_to_growth: int = _STEPS_TO_GROWTH) -> None:
        self.value = _FIRST
        self._num_good_steps = 0
        self._num_steps_to_growth = num_steps_to_growth

    @property
    def is_exhausted(self) -> bool:
        """Whether the scale cannot be lowered: gradients that are not finite now have another cause than float16."""
        return self.value <= 1.0

    def update(self, is_finite: bool) -> None:
        """Adapt the scale to whether the gradients of a step were finite."""
        if not is_finite:
            self.value = max(1.0, self.value / 2)
            self._num_good_steps = 0
            return
        self._num_good_steps += 1
        if self._num_good_steps == self._num_steps_to_growth:
            self.value = min(_LARGEST, self.value * 2)
            self._num_good_steps = 0

    def scalars(self) -> dict[str, float]:
        """The scale and the number of good steps since it changed."""
        return {SCALE: self.value, NUM_GOOD: float(self._num_good_steps)}

    def load_scalars(self, scalars: dict[str, float]) -> None:
        """Load what `scalars` returned; keep the initial scale if the run had another precision before."""
        self.value = scalars.get(SCALE, self.value)
        self._num_good_steps = int(scalars.get(NUM_GOOD, 0))
