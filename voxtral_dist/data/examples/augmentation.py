"""Augmentation of waveforms that is the same on any worker in any order: a draw is keyed by (seed, pass, sample id).

Importing it takes a second, because audiomentations does: whoever may do without imports it where it is used.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from voxtral_dist.config import AugmentationStep
from voxtral_dist.data.examples.transforms import LengthAwareTimeStretch, build_transform, reason_of
from voxtral_dist.data.stored.audio import AudioError, Waveform
from voxtral_dist.errors import UserError

# What every transform is tried on at the start.
_TRIAL_SECONDS = (0.05, 1.0)
_NUM_TRIAL_DRAWS = 3


class Augmentation:
    """A chain of transforms of the waveform whose draws depend on nothing but the key of each call."""

    def __init__(self, steps: Sequence[AugmentationStep], sampling_rate: int) -> None:
        """Build the chain and try it, because many transforms check their arguments only when they are used.

        Raises:
            UserError: a transform cannot be built, fails on a short clip, or draws what cannot be reproduced.
        """
        self._transforms = [(step.name, build_transform(step)) for step in steps]
        try:
            for position in range(len(steps)):
                self._try_out(self._transforms[position : position + 1], sampling_rate)
            self._try_out(self._transforms, sampling_rate)
        except AudioError as error:
            raise UserError(f"`train_data.augmentation`: a clip of noise {error}.") from error

    def __call__(self, waveform: Waveform, sampling_rate: int, key: Sequence[int], max_samples: int) -> Waveform:
        """The augmented waveform `(num_samples,)`, float32.

        Args:
            waveform: mono, in [-1, 1].
            sampling_rate: in Hz.
            key: (seed, pass, sample id).
            max_samples: what the windows of the original hold; the plan has counted these windows.

        Raises:
            AudioError: a transform fails, or the result is not finite, empty, or longer than `max_samples`.
        """
        augmented = _apply(self._transforms, waveform, sampling_rate, key, max_samples)
        if len(augmented) > max_samples:
            raise AudioError(
                f"is {len(augmented) / sampling_rate:.2f} s long after augmentation, but its windows hold "
                f"{max_samples / sampling_rate:.2f} s: use LengthAwareTimeStretch instead of other transforms that "
                "lengthen, or set their leave_length_unchanged to true"
            )
        return augmented

    def _try_out(self, transforms: Sequence[tuple[str, Any]], sampling_rate: int) -> None:
        generator = np.random.default_rng(0)
        with _always_applied(transforms):
            for seconds in _TRIAL_SECONDS:
                noise = generator.normal(0.0, 0.1, round(seconds * sampling_rate)).astype(np.float32)
                for draw in range(_NUM_TRIAL_DRAWS):
                    first, second = (
                        _apply(transforms, noise.copy(), sampling_rate, (draw,), sys.maxsize) for _ in range(2)
                    )
                    if not np.array_equal(first, second):
                        raise AudioError(
                            f"differs each time it is transformed by {transforms[-1][0]} with the same draws, so no "
                            "run could be repeated; TimeStretch does so at rates below 0.5"
                        )


def _apply(
    transforms: Sequence[tuple[str, Any]], waveform: Waveform, sampling_rate: int, key: Sequence[int], max_samples: int
) -> Waveform:
    # audiomentations draws from the two global generators: seed both for each sample.
    seed = int(np.random.SeedSequence(list(key)).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    for name, transform in transforms:
        if isinstance(transform, LengthAwareTimeStretch):
            transform.max_samples = max_samples
        try:
            # Each file of another rate would be warned about, in each worker.
            with warnings.catch_warnings(action="ignore"):
                waveform = transform(waveform, sampling_rate)
        except Exception as error:
            raise AudioError(f"cannot be transformed by {name}: {reason_of(error)}") from error
        waveform = _checked(waveform, name)
    return waveform


def _checked(waveform: Any, name: str) -> Waveform:
    if not isinstance(waveform, np.ndarray) or waveform.ndim != 1 or waveform.dtype.kind != "f":
        raise AudioError(f"is not one channel of floating point numbers after {name}")
    if len(waveform) == 0:
        raise AudioError(f"is empty after {name}: make its arguments milder, or remove it")
    if not np.isfinite(waveform).all():
        raise AudioError(f"holds samples that are not finite after {name}: make its arguments milder, or remove it")
    checked: Waveform = waveform.astype(np.float32, copy=False)
    return checked


@contextmanager
def _always_applied(transforms: Sequence[tuple[str, Any]]) -> Iterator[None]:
    probabilities = [transform.p for _, transform in transforms]
    for _, transform in transforms:
        transform.p = 1.0
    try:
        yield
    finally:
        for (_, transform), probability in zip(transforms, probabilities, strict=True):
            transform.p = probability
