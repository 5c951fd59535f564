"""An utterance as it is loaded, and as the model takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.data.stored.audio import Pcm


@dataclass(frozen=True)
class LoadedUtterance:
    """The audio of one utterance, `(num_samples,)` at the model's rate, and its text.

    text: as it is stored. target: what the steps of `target_text` make of it. instruction: what it answers; None where
    it is a transcript. fields: the json of the sample.
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

    pcm is int16 `(num_samples,)` without padding, and takes `num_windows` windows; `completion` is made of the targets,
    and ends with `</s>`. reference: the stored texts. `utterance_id` and `key` are those of the first utterance.
    is_transcription: whether the completion is a transcript, and not the answer to an instruction. is_untagged: whether
    the prompt does not tell the language. context: that of the prompt. fields: those of the first utterance's json that
    the reader keeps. feature_masks are those of `draw_feature_masks`, and none in evaluations.
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
