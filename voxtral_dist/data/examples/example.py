"""An utterance as loaded, and an example as the model takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.data.stored.audio import Pcm


@dataclass(frozen=True)
class LoadedUtterance:
    """One utterance with decoded, checked and augmented audio.

    utterance_id: its number in the index.
    key: its WebDataset key.
    pcm: int16 `(num_samples,)` at the sampling rate of the model.
    text: the stored text.
    target: the text after the steps of `target_text`.
    language: an ISO 639-1 code; None if unknown.
    instruction: what the text answers; None for a transcript.
    fields: its json.
    """

    utterance_id: int
    key: str
    pcm: Pcm
    text: str
    target: str
    language: str | None
    instruction: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    """One utterance, or several packed ones, as the model takes it.

    utterance_id, key: of the first utterance.
    pcm: int16 `(num_samples,)` without padding.
    num_windows: encoder windows that the audio takes.
    prompt: token ids before the completion.
    completion: token ids of the targets, and `</s>`; with the language tag in front if `is_untagged` and the language
        is known.
    reference: the stored texts.
    duration_seconds: duration of the audio.
    num_utterances: number of packed utterances.
    is_transcription: whether the completion is a transcript rather than the answer to an instruction.
    is_untagged: whether the prompt omits the language.
    context: the context in the prompt; empty for none.
    fields: what the reader keeps of the first utterance's json.
    feature_masks: int64 `(num_masks, 4)`, see `draw_feature_masks`; none in evaluations.
    """

    utterance_id: int
    key: str
    pcm: Pcm
    num_windows: int
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    reference: str
    duration_seconds: float
    num_utterances: int = 1
    is_transcription: bool = True
    is_untagged: bool = False
    context: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    feature_masks: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 4), dtype=np.int64))
