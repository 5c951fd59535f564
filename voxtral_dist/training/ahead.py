"""Micro-batches on their way to the device: the next one is copied, and its features computed, beside this one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from voxtral_dist.data.examples.micro_batch import MicroBatch
from voxtral_dist.model.features import LogMel, mask_features


class MicroBatchesAhead:
    """Brings the micro-batches of a step to the device, one ahead of the one that is computed.

    Copies and log-mel features run on a stream of their own, so they take no time of the one that computes. The host
    waits for nothing. On a CPU there are no streams, and the loss computes the features.
    """

    def __init__(self, log_mel: LogMel | None, device: torch.device) -> None:
        """Prepare the stream; without `log_mel`, the loss computes features on GPUs too."""
        self._log_mel = log_mel
        self._device = device
        self._stream = torch.Stream(device=device) if device.type != "cpu" else None

    def __call__(self, micro_batches: Sequence[MicroBatch]) -> Iterator[MicroBatch]:
        """Yield the micro-batches in order; those on a GPU with features."""
        begun = (self._begin(batch) for batch in micro_batches)
        current = next(begun)
        for upcoming in begun:
            yield self._end(*current)
            current = upcoming
        yield self._end(*current)

    def _begin(self, batch: MicroBatch) -> tuple[MicroBatch, torch.Event | None]:
        if self._stream is None:
            return batch.to(self._device), None
        with self._stream:
            there = batch.to(self._device)
            if self._log_mel is not None:
                features = mask_features(self._log_mel(there.pcm, there.windows_per_example), there.feature_masks)
                there = replace(there, features=features)
        return there, self._stream.record_event()

    def _end(self, batch: MicroBatch, event: torch.Event | None) -> MicroBatch:
        """Let the stream that computes wait for a micro-batch, and keep its memory until that stream has used it."""
        if event is not None:
            computing = torch.accelerator.current_stream(self._device)
            computing.wait_event(event)
            for tensor in batch.tensors:
                tensor.record_stream(computing)
        return batch
