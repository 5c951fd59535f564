"""Micro-batches divided into smaller ones with the same gradient, for a device whose memory does not suffice."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from torch import Tensor

from voxtral_dist.data.examples.micro_batch import MicroBatch


def divided(batch: MicroBatch, num_parts: int) -> list[MicroBatch]:
    """Divide the examples of a micro-batch evenly, in order; summed losses of the parts add up to its own.

    A part without examples is a micro-batch without targets, because all ranks run as many parts. Padding behind the
    longest example of a part is cut off. Numbers of chunks stay, which ranks have agreed on.

    Args:
        batch: as it was collated: without features.
        num_parts: the number of parts.
    """
    if num_parts == 1:
        return [batch]
    count = len(batch.positions_per_example)
    bounds = [count * number // num_parts for number in range(num_parts + 1)]
    return [
        _examples(batch, first, last) if first < last else _without_targets(batch) for first, last in pairwise(bounds)
    ]


def _examples(batch: MicroBatch, first: int, last: int) -> MicroBatch:
    positions = batch.positions_per_example[first:last]
    width = max(positions)
    first_window = sum(batch.windows_per_example[:first])
    num_windows = sum(batch.windows_per_example[first:last])
    windows = batch.feature_masks[:, 0] - first_window
    masks = batch.feature_masks[(windows >= 0) & (windows < num_windows)].clone()
    masks[:, 0] -= first_window
    audio_places, _ = _places(batch, batch.audio_places, first, last, width)
    target_places, is_inside = _places(batch, batch.target_places, first, last, width)
    part = replace(
        batch,
        input_ids=batch.input_ids[first:last, :width].contiguous(),
        audio_places=audio_places,
        target_places=target_places,
        target_ids=batch.target_ids[is_inside],
        pcm=batch.pcm[first_window : first_window + num_windows],
        feature_masks=masks,
        positions_per_example=positions,
        windows_per_example=batch.windows_per_example[first:last],
        audio_seconds=sum(batch.seconds_per_example[first:last]),
        # Packed examples have more, which are counted before micro-batches are divided.
        num_utterances=min(batch.num_utterances, last - first),
        bad_utterances=(),
        keys=batch.keys[first:last],
        seconds_per_example=batch.seconds_per_example[first:last],
    )
    return part.pin_memory() if batch.input_ids.is_pinned() else part


def _places(batch: MicroBatch, places: Tensor, first: int, last: int, width: int) -> tuple[Tensor, Tensor]:
    """Places of the flattened `(B, T)` in that of some examples with another T, and which of them these are."""
    old_width = batch.input_ids.shape[1]
    rows = places // old_width
    is_inside = (rows >= first) & (rows < last)
    return ((rows - first) * width + places % old_width)[is_inside], is_inside


def _without_targets(batch: MicroBatch) -> MicroBatch:
    """The shortest example as a micro-batch of weight zero."""
    shortest = min(range(len(batch.positions_per_example)), key=batch.positions_per_example.__getitem__)
    part = _examples(batch, shortest, shortest + 1)
    return replace(
        part,
        target_places=part.target_places[:0],
        target_ids=part.target_ids[:0],
        audio_seconds=0.0,
        num_utterances=0,
    )
