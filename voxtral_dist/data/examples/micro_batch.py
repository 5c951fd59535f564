"""Micro-batches: examples padded together for one forward pass of one rank.

    B  examples                          T  input tokens of the longest example
    C  encoder windows of all examples   K  tokens of the longest completion
    S  samples of a window               N  target tokens of all examples
    M  mel bins of a feature frame       F  feature frames of a window

Examples are padded on the left, so that all completions end at the last position. Logits are then needed for the last
K positions only, and not for hundreds of audio positions over the whole vocabulary. A micro-batch carries PCM `(C, S)`;
the device computes the features `(C, M, F)` from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxtral_dist.data.examples.bad_utterance import BadUtterance
from voxtral_dist.data.examples.example import Example
from voxtral_dist.model.prompts import VoxtralPrompts

# What torch's cross entropy ignores by default.
IGNORED_LABEL = -100


@dataclass(frozen=True)
class MicroBatch:
    """Token ids, labels and audio of B examples; the module explains the dimensions.

    input_ids: int64 `(B, T)`, prompt and completion without the final `</s>`, which predicts nothing.
    attention_mask: int64 `(B, T)`, 0 on padding.
    labels: int64 `(B, K)`, the next token of each of the last K positions, `IGNORED_LABEL` before the completion.
    target_places: int64 `(N,)`, the positions in the flattened `(B, T)` that predict a target.
    target_ids: int64 `(N,)`, the targets that they predict.
    pcm: int16 `(C, S)`, the windows of the examples, in order.
    feature_masks: int64 `(num_masks, 4)`: window of C, axis (0 frequency, 1 time), start, end; for `mask_features`.
    windows_per_example: encoder windows of each example; they add up to C.
    audio_seconds: audio of all examples, without the silence that fills windows.
    num_utterances: utterances in all examples.
    bad_utterances: utterances that belong here but cannot be used.
    num_encoder_chunks: number of chunks in which the encoder takes the windows; ranks with sharded weights agree on it.

    Example:
        >>> from voxtral_dist import UtteranceReader, VoxtralPrompts, collate, read_index
        >>> prompts = VoxtralPrompts.from_pretrained("models/tiny")
        >>> reader = UtteranceReader(read_index(["shards/speech"]), prompts, max_target_tokens=None)
        >>> batch = collate([reader.example(0), reader.example(1)], prompts.pad_id, prompts.window_samples)
        >>> batch.input_ids.shape == batch.attention_mask.shape
        True
        >>> (batch.labels != -100).sum().item() == batch.num_target_tokens
        True
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    target_places: Tensor
    target_ids: Tensor
    pcm: Tensor
    feature_masks: Tensor
    windows_per_example: tuple[int, ...]
    audio_seconds: float
    num_utterances: int
    bad_utterances: tuple[BadUtterance, ...] = ()
    num_encoder_chunks: int = 1

    @property
    def num_windows(self) -> int:
        """Encoder windows of all examples, C."""
        return len(self.pcm)

    @property
    def positions_per_example(self) -> list[int]:
        """Input tokens of each example, without padding. Synchronizes with the GPU if the batch is there."""
        counts: list[int] = self.attention_mask.sum(dim=1).tolist()
        return counts

    @property
    def num_target_tokens(self) -> int:
        """Labels that count in the loss."""
        return len(self.target_ids)

    @property
    def position_ids(self) -> Tensor:
        """Position ids, int64 `(B, T)`, counted from the first token that is not padding, as in generation."""
        return (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)

    def to(self, device: torch.device) -> MicroBatch:
        """Copy the tensors of the batch to a device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            attention_mask=self.attention_mask.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            target_places=self.target_places.to(device, non_blocking=True),
            target_ids=self.target_ids.to(device, non_blocking=True),
            pcm=self.pcm.to(device, non_blocking=True),
            feature_masks=self.feature_masks.to(device, non_blocking=True),
        )


def collate(
    examples: Sequence[Example], pad_id: int, window_samples: int, bad_utterances: Sequence[BadUtterance] = ()
) -> MicroBatch:
    """Pad examples into one micro-batch.

    Args:
        examples: at least one.
        pad_id: token id of the padding.
        window_samples: samples of an encoder window.
        bad_utterances: utterances that the micro-batch lacks.

    Example:
        >>> from voxtral_dist import UtteranceReader, VoxtralPrompts, collate, read_index
        >>> prompts = VoxtralPrompts.from_pretrained("models/tiny")
        >>> reader = UtteranceReader(read_index(["shards/speech"]), prompts, max_target_tokens=None)
        >>> batch = collate([reader.example(0), reader.example(1)], prompts.pad_id, prompts.window_samples)
        >>> batch.num_utterances
        2
    """
    input_ids, attention_mask = pad_left([(*example.prompt, *example.completion[:-1]) for example in examples], pad_id)
    labels, _ = pad_left([example.completion for example in examples], IGNORED_LABEL)
    return MicroBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=labels,
        target_places=_target_places(labels, input_ids.shape[1]),
        target_ids=labels[labels != IGNORED_LABEL],
        pcm=windows_of(examples, window_samples),
        feature_masks=torch.from_numpy(_feature_masks(examples)),
        windows_per_example=tuple(example.num_windows for example in examples),
        audio_seconds=sum(example.duration_seconds for example in examples),
        num_utterances=sum(example.num_utterances for example in examples),
        bad_utterances=tuple(bad_utterances),
    )


def _target_places(labels: Tensor, num_positions: int) -> Tensor:
    """The flattened positions of the labels that count, `(N,)`: found on the CPU, to avoid a GPU synchronization."""
    rows, places = (labels != IGNORED_LABEL).nonzero(as_tuple=True)
    return rows * num_positions + num_positions - labels.shape[1] + places


def _feature_masks(examples: Sequence[Example]) -> NDArray[np.int64]:
    """The masks of all examples, with windows numbered over the whole batch, `(num_masks, 4)`."""
    first_windows = np.cumsum([0, *(example.num_windows for example in examples[:-1])])
    return np.concatenate(
        [
            example.feature_masks + np.array([first_window, 0, 0, 0])
            for example, first_window in zip(examples, first_windows, strict=True)
        ]
    )


def pad_left(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad sequences of ids on the left: ids and attention mask, both int64 `(B, T)`; T is the longest sequence."""
    width = max(len(sequence) for sequence in sequences)
    ids = np.full((len(sequences), width), pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = sequence
        mask[row, width - len(sequence) :] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def windows_of(examples: Sequence[Example], window_samples: int) -> Tensor:
    """The audio of all examples, int16 `(C, S)`: each starts in a new window, and silence fills its last one."""
    windows = np.zeros((sum(example.num_windows for example in examples), window_samples), dtype=np.int16)
    first = 0
    for example in examples:
        windows[first : first + example.num_windows].reshape(-1)[: len(example.pcm)] = example.pcm
        first += example.num_windows
    return torch.from_numpy(windows)


def silent_example(prompts: VoxtralPrompts) -> Example:
    """An example of one window of silence, which belongs to no utterance."""
    return Example(
        utterance_id=-1,
        key="",
        pcm=np.zeros(0, dtype=np.int16),
        num_windows=1,
        prompt=prompts.transcription(None, 1),
        completion=(prompts.eos_id,),
        reference="",
        duration_seconds=0.0,
    )


def weightless_micro_batch(prompts: VoxtralPrompts, bad_utterances: Sequence[BadUtterance] = ()) -> MicroBatch:
    """A micro-batch of one window of silence without targets, for a slot without usable examples.

    Sharded engines gather weights in every forward and backward pass, so all ranks must run the same number of them.
    """
    batch = collate([silent_example(prompts)], prompts.pad_id, prompts.window_samples, bad_utterances)
    nothing = torch.zeros(0, dtype=torch.int64)
    labels = torch.full_like(batch.labels, IGNORED_LABEL)
    return replace(batch, labels=labels, target_places=nothing, target_ids=nothing, num_utterances=0)
