"""Exponential moving averages (EMA) of the trained weights, each where its weight is: a rank averages what it updates.

After each update, average = decay * average + (1 - decay) * weight, in float32, starting from the initial weights
(Kingma and Ba, arXiv 1412.6980, section 7.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

# Name of an average in a checkpoint, after that of its weight.
AVERAGE = "ema"


def average_name(weight_name: str) -> str:
    """The name of a weight's average in a checkpoint."""
    return f"{weight_name}//{AVERAGE}"


class WeightAverages:
    """The averages of tensors that an optimizer updates. Nothing of it communicates."""

    def __init__(self, decay: float, weights: Callable[[], Sequence[Tensor]]) -> None:
        """Start from the current weights.

        Args:
            decay: share of the average that an update keeps.
            weights: returns the float32 tensors, always as many and in the same order; their memory may change.
        """
        self._weights = weights
        self._update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        # The averages, in the order of the weights.
        self.tensors = [weight.detach().clone() for weight in weights()]

    def update(self) -> None:
        """Include the weights of one more update, by one operation on all of them."""
        self._update(self.tensors, [weight.detach() for weight in self._weights()], 0)

    @torch.no_grad()
    def restart(self) -> None:
        """Start again from the current weights."""
        for average, weight in zip(self.tensors, self._weights(), strict=True):
            average.copy_(weight)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Exchange averages and weights, and back at the end: without a copy of either, and exactly."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, weight in zip(self.tensors, self._weights(), strict=True):
            held = weight.clone()
            weight.copy_(average)
            average.copy_(held)
