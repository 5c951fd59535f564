"""Examples padded together into what one forward pass of one rank takes.

    B examples   C windows of all examples   S samples of a window   T input positions   K positions that carry targets
    N feature masks

Prompts are padded on the left, so that all completions end at the last position. Then logits are needed for the last K
positions alone, where K is the longest completion: not for hundreds of audio positions over the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxtral_dist.data.prompts import TranscriptionPrompts
from voxtral_dist.data.samples import BadSample, Example

# What torch's cross entropy ignores by default.
IGNORED_LABEL = -100


@dataclass(frozen=True)
class MicroBatch:
    """Token ids, labels and audio of some examples; see the legend of dimensions above.

    input_ids: int64 `(B, T)`: prompt and completion, without the last `</s>`, which predicts nothing.
    attention_mask: int64 `(B, T)`: 0 on padding.
    labels: int64 `(B, K)`: the token that follows each of the last K positions, `IGNORED_LABEL` before the completion.
    pcm: int16 `(C, S)`: the windows of the examples, in order.
    feature_masks: int64 `(N, 4)`: window of C, axis (0 frequency, 1 time), start, end; for `mask_features`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    pcm: Tensor
    feature_masks: Tensor
    windows_per_example: tuple[int, ...]
    audio_seconds: float
    num_samples: int
    bad_samples: tuple[BadSample, ...] = ()

    @property
    def num_targets(self) -> int:
        """Labels that count in the loss."""
        return int((self.labels != IGNORED_LABEL).sum())

    @property
    def position_ids(self) -> Tensor:
        """int64 `(B, T)`: counted from the first real token, as generation counts them."""
        return (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)

    def to(self, device: torch.device) -> MicroBatch:
        """The batch with its tensors on a device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            attention_mask=self.attention_mask.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            pcm=self.pcm.to(device, non_blocking=True),
            feature_masks=self.feature_masks.to(device, non_blocking=True),
        )


def collate(examples: Sequence[Example], pad_id: int, bad_samples: Sequence[BadSample] = ()) -> MicroBatch:
    """One micro-batch of at least one example."""
    sequences = [(*example.prompt, *example.completion[:-1]) for example in examples]
    input_ids, attention_mask = pad_left(sequences, pad_id)
    num_kept = max(len(example.completion) for example in examples)
    labels = torch.full((len(examples), num_kept), IGNORED_LABEL)
    for row, example in zip(labels, examples, strict=True):
        row[num_kept - len(example.completion) :] = torch.tensor(example.completion)
    return MicroBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=labels,
        pcm=torch.from_numpy(np.concatenate([example.pcm for example in examples])),
        feature_masks=torch.from_numpy(_feature_masks(examples)),
        windows_per_example=tuple(len(example.pcm) for example in examples),
        audio_seconds=sum(example.duration_seconds for example in examples),
        num_samples=sum(example.num_samples for example in examples),
        bad_samples=tuple(bad_samples),
    )


def _feature_masks(examples: Sequence[Example]) -> NDArray[np.int64]:
    """The masks of all examples, their windows counted over the batch."""
    first_windows = np.cumsum([0, *(len(example.pcm) for example in examples[:-1])])
    return np.concatenate(
        [
            example.feature_masks + np.array([first_window, 0, 0, 0])
            for example, first_window in zip(examples, first_windows, strict=True)
        ]
    )


def pad_left(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, both int64 `(B, T)`, T being the longest of the sequences."""
    width = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), width), pad_id)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = 1
    return ids, mask


def weightless_micro_batch(prompts: TranscriptionPrompts, bad_samples: Sequence[BadSample] = ()) -> MicroBatch:
    """One window of silence without a target, for a slot that has nothing to train on.

    Sharded engines exchange weights in every forward and backward pass, so all ranks must run equally many.
    """
    silence = Example(
        sample_id=-1,
        key="",
        pcm=np.zeros((1, prompts.window_samples), dtype=np.int16),
        prompt=prompts.prompt(None, 1),
        completion=(prompts.eos_id,),
        reference="",
        duration_seconds=0.0,
    )
    batch = collate([silence], prompts.pad_id, bad_samples)
    return replace(batch, labels=torch.full_like(batch.labels, IGNORED_LABEL), num_samples=0)
