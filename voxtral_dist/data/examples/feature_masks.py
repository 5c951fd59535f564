"""SpecAugment masks, seeded by (seed, epoch, utterance id): any worker in any order draws the same.

Park et al., arXiv 1904.08779, with limits that adapt to the length of the audio (arXiv 1912.05533). Data workers draw
the masks, and `mask_features` applies them on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.config import SpecAugmentConfig
from voxtral_dist.errors import UserError

FREQUENCY_AXIS = 0
TIME_AXIS = 1


def check_spec_augment(config: SpecAugmentConfig, num_mel_bins: int) -> None:
    """Refuse frequency masks wider than the features of the model.

    Raises:
        UserError: `max_frequency_mask_bins` is too large.
    """
    if config.max_frequency_mask_bins > num_mel_bins:
        raise UserError(
            f"`train_data.spec_augment.max_frequency_mask_bins` must be at most {num_mel_bins}, the number of mel bins "
            f"of the model, but is {config.max_frequency_mask_bins} instead."
        )


def draw_feature_masks(
    config: SpecAugmentConfig,
    key: Sequence[int],
    num_valid_frames: int,
    num_frames_per_window: int,
    num_mel_bins: int,
    *,
    frames_per_second: float,
) -> NDArray[np.int64]:
    """Draw the masks of one example, int64 `(num_masks, 4)`: window, axis (0 frequency, 1 time), start, end.

    Audio of several windows is masked as a whole: a time mask is split where a window ends, and a frequency mask is
    repeated in each window. Ends are exclusive, and masks of width 0 are omitted.

    Args:
        config: number and maximum width of the masks.
        key: (seed, epoch, utterance id), which seeds the draws.
        num_valid_frames: frames with audio; time masks lie inside them.
        num_frames_per_window: frames of an encoder window, 3,000 in the published models.
        num_mel_bins: 128 in the published models.
        frames_per_second: 100 in the published models.
    """
    generator = np.random.default_rng(list(key))
    max_frames = min(
        int(config.max_time_mask_seconds * frames_per_second), int(config.max_time_mask_fraction * num_valid_frames)
    )
    num_windows = -(-num_valid_frames // num_frames_per_window)
    masks: list[tuple[int, int, int, int]] = []
    for start, end in _spans(generator, config.num_time_masks, max_frames, num_valid_frames):
        masks += _cut_at_windows(start, end, num_frames_per_window)
    for start, end in _spans(generator, config.num_frequency_masks, config.max_frequency_mask_bins, num_mel_bins):
        masks += [(window, FREQUENCY_AXIS, start, end) for window in range(num_windows)]
    return np.array(masks, dtype=np.int64).reshape(-1, 4)


def _spans(generator: np.random.Generator, num_masks: int, max_width: int, length: int) -> Iterator[tuple[int, int]]:
    """Half-open spans in `[0, length)`, uniform in width and then in place; empty ones are omitted."""
    for _ in range(num_masks):
        width = int(generator.integers(0, min(max_width, length), endpoint=True))
        start = int(generator.integers(0, length - width, endpoint=True))
        if width > 0:
            yield start, start + width


def _cut_at_windows(start: int, end: int, window_frames: int) -> Iterator[tuple[int, int, int, int]]:
    for window in range(start // window_frames, -(-end // window_frames)):
        first = window * window_frames
        yield window, TIME_AXIS, max(start - first, 0), min(end - first, window_frames)
