"""Augmentation of waveforms, seeded by (seed, epoch, utterance id): any worker in any order draws the same.

Audiomentations takes a second to import: import this module where it is used.
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

# Durations of the noise that every transform is tried on at the start.
_TRIAL_SECONDS = (0.05, 1.0)
_NUM_TRIAL_DRAWS = 3


class Augmentation:
    """A chain of transforms of the waveform whose draws depend only on the key of each call."""

    def __init__(self, steps: Sequence[AugmentationStep], sampling_rate: int) -> None:
        """Build the chain and try it out, because many transforms check their arguments only when they are applied.

        Raises:
            UserError: a transform cannot be built, fails on short noise, or is not reproducible.
        """
        self._transforms = [(step.name, build_transform(step)) for step in steps]
        try:
            for position in range(len(steps)):
                self._try_out(self._transforms[position : position + 1], sampling_rate)
            self._try_out(self._transforms, sampling_rate)
        except AudioError as error:
            raise UserError(f"`train_data.augmentation`: a trial clip of noise {error}.") from error

    def __call__(self, waveform: Waveform, sampling_rate: int, key: Sequence[int], max_samples: int) -> Waveform:
        """Augment a waveform; float32 `(num_samples,)`.

        Args:
            waveform: mono, in [-1, 1].
            sampling_rate: in Hz.
            key: (seed, epoch, utterance id).
            max_samples: the maximum length of the result: the windows of the original, which the plan has counted.

        Raises:
            AudioError: a transform fails, or the result is not finite, empty, or longer than `max_samples`.
        """
        augmented = _apply(self._transforms, waveform, sampling_rate, key, max_samples)
        if len(augmented) > max_samples:
            raise AudioError(
                f"is {len(augmented) / sampling_rate:.2f} s long after augmentation, but its windows hold "
                f"{max_samples / sampling_rate:.2f} s: use LengthAwareTimeStretch instead of other transforms that "
                "lengthen audio, or set their leave_length_unchanged to true"
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
                            f"differs each time it is transformed by {transforms[-1][0]} with the same seed, so no "
                            "run could be reproduced; TimeStretch does so at rates below 0.5"
                        )


def _apply(
    transforms: Sequence[tuple[str, Any]], waveform: Waveform, sampling_rate: int, key: Sequence[int], max_samples: int
) -> Waveform:
    # audiomentations draws from the two global generators: seed both for each utterance.
    seed = int(np.random.SeedSequence(list(key)).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    for name, transform in transforms:
        if isinstance(transform, LengthAwareTimeStretch):
            transform.max_samples = max_samples
        try:
            # audiomentations warns in each worker about each file of another sampling rate.
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
        raise AudioError(f"is empty after {name}: use milder arguments, or remove the transform")
    if not np.isfinite(waveform).all():
        raise AudioError(
            f"contains samples that are not finite after {name}: use milder arguments, or remove the transform"
        )
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
