"""What the prompts of a training or test set tell the model, besides the audio: the language or not, and a context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from voxtral_dist.config import TextStep, TrainDataConfig
from voxtral_dist.data.examples.context import Contexts, TrainingContexts
from voxtral_dist.data.plan.permutation import hash_values
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.text.word_list import WordList

# What the draw of the tag is keyed by, besides the sample.
_DRAW = 2


@dataclass(frozen=True)
class Prompting:
    """How the samples of a set are asked about, and what becomes of their texts.

    untagged_fraction: of the samples whose prompts do not tell the language. contexts: None gives none. target_text:
    the steps that make the answer of the stored text.
    """

    untagged_fraction: float = 0.0
    contexts: Contexts | None = None
    target_text: tuple[TextStep, ...] = ()

    @classmethod
    def of_training(cls, config: TrainDataConfig, prompts: VoxtralPrompts, words: WordList | None) -> Prompting:
        """That of a run with these words of contexts."""
        contexts = None if config.context is None else TrainingContexts(config.context, prompts, words)
        return cls(config.untagged_fraction, contexts, config.target_text)

    def is_untagged(self, key: Sequence[int]) -> bool:
        """Whether a sample is asked about without its language; drawn by the whole numbers of a key."""
        drawn = int(hash_values(np.zeros(1, dtype=np.int64), (*key, _DRAW))[0])
        return drawn < self.untagged_fraction * 2**64

    def context(self, text: str, fields: Sequence[Mapping[str, Any]], key: Sequence[int]) -> str:
        """The context of clips, drawn by the same key; empty for none. See `Contexts`."""
        return "" if self.contexts is None else self.contexts(text, fields, key)
