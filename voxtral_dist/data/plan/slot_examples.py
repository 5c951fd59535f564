"""The examples of one slot."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SlotExamples:
    """The examples of one slot of one step.

    utterance_ids: of all examples, one after the other.
    epochs: how often the stream of each sample was gone through before; with the sample it keys augmentation.
    example_sizes: how many of the samples each example takes; other than 1 only where samples are packed.
    """

    utterance_ids: tuple[int, ...]
    epochs: tuple[int, ...]
    example_sizes: tuple[int, ...]
