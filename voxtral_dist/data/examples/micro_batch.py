"""Micro-batches: examples padded together for one forward pass of one rank.

    B  examples                          T  input tokens of the longest example
    C  encoder windows of all examples   A  audio tokens of all windows
    S  samples of a window               N  target tokens of all examples
    M  mel bins of a feature frame       F  feature frames of a window

Examples are padded on the right. Attention is causal, so no token sees the padding behind it: training needs neither an
attention mask nor position ids. Where targets and audio tokens are is found here, on the CPU, so that the device is
never waited for. A micro-batch carries PCM `(C, S)`; the device computes the features `(C, M, F)` from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxtral_dist.data.examples.bad_utterance import BadUtterance
from voxtral_dist.data.examples.example import Example
from voxtral_dist.model.prompts import VoxtralPrompts

# What torch's cross entropy ignores by default.
IGNORED_LABEL = -100
# Tensors that data workers make.
_COLLATED = ("input_ids", "audio_places", "target_places", "target_ids", "pcm", "feature_masks")


@dataclass(frozen=True)
class MicroBatch:
    """Token ids, labels and audio of B examples; the module explains the dimensions.

    input_ids: int64 `(B, T)`, prompt and completion without the final `</s>`, which predicts nothing; padded behind.
    audio_places: int64 `(A,)`, the positions of audio tokens in the flattened `(B, T)`, in the order of the windows.
    target_places: int64 `(N,)`, the positions in the flattened `(B, T)` that predict a target.
    target_ids: int64 `(N,)`, the targets that they predict.
    pcm: int16 `(C, S)`, the windows of the examples, in order.
    feature_masks: int64 `(num_masks, 4)`: window of C, axis (0 frequency, 1 time), start, end; for `mask_features`.
    positions_per_example: input tokens of each example, without padding.
    windows_per_example: encoder windows of each example; they add up to C.
    audio_seconds: audio of all examples, without the silence that fills windows.
    num_utterances: utterances in all examples.
    bad_utterances: utterances that belong here but cannot be used.
    keys: WebDataset key of each example, of the first utterance of a packed one.
    seconds_per_example: duration of each example.
    num_encoder_chunks: number of chunks in which the encoder takes the windows; ranks with sharded weights agree on it.
    num_mlp_chunks: the same for the MLPs of the language model; None without a limit of their positions.
    features: float32 `(C, M, F)`, masked log-mel features of `pcm`; None where the loss computes them.
    read_error: why its utterances could not be read, where their storage fails: then it has none, and ends the run.

    Example:
        >>> from voxtral_dist import UtteranceReader, VoxtralPrompts, collate, read_index
        >>> prompts = VoxtralPrompts.from_pretrained("models/tiny")
        >>> reader = UtteranceReader(read_index(["shards/speech"]), prompts, max_target_tokens=None)
        >>> batch = collate([reader.example(0), reader.example(1)], prompts)
        >>> batch.input_ids.shape == (2, max(batch.positions_per_example))
        True
        >>> (batch.labels != -100).sum().item() == batch.num_target_tokens
        True
    """

    input_ids: Tensor
    audio_places: Tensor
    target_places: Tensor
    target_ids: Tensor
    pcm: Tensor
    feature_masks: Tensor
    positions_per_example: tuple[int, ...]
    windows_per_example: tuple[int, ...]
    audio_seconds: float
    num_utterances: int
    bad_utterances: tuple[BadUtterance, ...] = ()
    keys: tuple[str, ...] = ()
    seconds_per_example: tuple[float, ...] = ()
    num_encoder_chunks: int = 1
    num_mlp_chunks: int | None = None
    features: Tensor | None = None
    read_error: str | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """All of its tensors."""
        features = [] if self.features is None else [self.features]
        return [*(getattr(self, name) for name in _COLLATED), *features]

    @property
    def num_windows(self) -> int:
        """Encoder windows of all examples, C."""
        return len(self.pcm)

    @property
    def num_target_tokens(self) -> int:
        """Labels that count in the loss."""
        return len(self.target_ids)

    @property
    def labels(self) -> Tensor:
        """The token that each position predicts, int64 `(B, T)`, `IGNORED_LABEL` where it counts in no loss."""
        labels = torch.full_like(self.input_ids, IGNORED_LABEL)
        labels.view(-1)[self.target_places] = self.target_ids
        return labels

    def to(self, device: torch.device) -> MicroBatch:
        """Copy the tensors of the batch to a device; from pinned memory the copy does not block."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> MicroBatch:
        """Copy the tensors to page-locked host memory; a DataLoader with `pin_memory=True` calls it."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, function: Callable[[Tensor], Tensor]) -> MicroBatch:
        made: dict[str, Any] = {name: function(getattr(self, name)) for name in _COLLATED}
        return replace(self, **made)


def collate(
    examples: Sequence[Example], prompts: VoxtralPrompts, bad_utterances: Sequence[BadUtterance] = ()
) -> MicroBatch:
    """Pad examples into one micro-batch.

    Args:
        examples: at least one.
        prompts: the ids of padding and audio tokens, and the length of a window.
        bad_utterances: utterances that the micro-batch lacks.

    Example:
        >>> from voxtral_dist import UtteranceReader, VoxtralPrompts, collate, read_index
        >>> prompts = VoxtralPrompts.from_pretrained("models/tiny")
        >>> reader = UtteranceReader(read_index(["shards/speech"]), prompts, max_target_tokens=None)
        >>> batch = collate([reader.example(0), reader.example(1)], prompts)
        >>> batch.num_utterances
        2
    """
    rows = [(*example.prompt, *example.completion[:-1]) for example in examples]
    width = max(map(len, rows))
    ids = np.full((len(rows), width), prompts.pad_id, dtype=np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    # The token before the first target predicts it, and so on to `</s>`: as many positions as targets end each row.
    places = [
        np.arange(len(row) - len(example.completion), len(row)) + number * width
        for number, (row, example) in enumerate(zip(rows, examples, strict=True))
    ]
    return MicroBatch(
        input_ids=torch.from_numpy(ids),
        audio_places=torch.from_numpy(np.flatnonzero(ids == prompts.audio_id)),
        target_places=torch.from_numpy(np.concatenate(places)),
        target_ids=torch.from_numpy(np.concatenate([example.completion for example in examples]).astype(np.int64)),
        pcm=windows_of(examples, prompts.window_samples),
        feature_masks=torch.from_numpy(_feature_masks(examples)),
        positions_per_example=tuple(map(len, rows)),
        windows_per_example=tuple(example.num_windows for example in examples),
        audio_seconds=sum(example.duration_seconds for example in examples),
        num_utterances=sum(example.num_utterances for example in examples),
        bad_utterances=tuple(bad_utterances),
        keys=tuple(example.key for example in examples),
        seconds_per_example=tuple(example.duration_seconds for example in examples),
    )


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
    """Pad prompts on the left, as generation needs them: ids and attention mask, both int64 `(B, T)`."""
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
    batch = collate([silent_example(prompts)], prompts, bad_utterances)
    nothing = torch.zeros(0, dtype=torch.int64)
    return replace(batch, target_places=nothing, target_ids=nothing, num_utterances=0)
