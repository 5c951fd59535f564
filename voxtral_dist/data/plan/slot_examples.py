"""The examples of one slot, by the utterances that they hold."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SlotExamples:
    """The examples of one slot of one step; all fields are empty for an empty slot.

    utterance_ids: the utterances of all examples, concatenated.
    epochs: for each utterance, the epoch of its stream in which it is drawn, counted from 0; keys its augmentation.
    example_sizes: the number of utterances in each example; more than 1 only where utterances are packed.
    """

    utterance_ids: tuple[int, ...]
    epochs: tuple[int, ...]
    example_sizes: tuple[int, ...]
