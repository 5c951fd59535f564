"""What examples cost the model, judged on the records of the index alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.data.stored.shard_set import Records
from voxtral_dist.model.prompts import VoxtralPrompts


@dataclass(frozen=True)
class ExampleSizes:
    """What examples cost the model, from their records alone.

    window_ms: the length of a window. num_prompt_tokens: of a prompt with a context, besides its audio and instruction.
    max_positions: of the language model.
    """

    window_ms: int
    audio_tokens_per_window: int
    num_prompt_tokens: int
    max_positions: int

    @classmethod
    def of(cls, prompts: VoxtralPrompts, max_context_tokens: int = 0) -> ExampleSizes:
        """The sizes of one checkpoint's windows and prompts, the longest prompts there are."""
        return cls(
            window_ms=round(prompts.window_seconds * 1000),
            audio_tokens_per_window=prompts.audio_tokens_per_window,
            num_prompt_tokens=prompts.num_prompt_tokens + max_context_tokens,
            max_positions=prompts.max_positions,
        )

    def windows(self, duration_ms: NDArray[np.integer]) -> NDArray[np.int64]:
        """Windows that clips fill: what the encoder pays."""
        return np.maximum(1, -(-duration_ms.astype(np.int64) // self.window_ms))

    def positions(self, num_windows: NDArray[np.int64], num_text_tokens: NDArray[np.integer]) -> NDArray[np.int64]:
        """Input positions of the language model: audio tokens, prompt, and the tokens of instruction and answer."""
        return num_windows * self.audio_tokens_per_window + self.num_prompt_tokens + num_text_tokens.astype(np.int64)

    def positions_of(self, records: Records) -> NDArray[np.int64]:
        """Input positions of samples that are examples of their own."""
        return self.positions(self.windows(records["duration_ms"]), text_tokens(records))


def text_tokens(records: Records) -> NDArray[np.int64]:
    """Tokens of instruction and answer."""
    tokens: NDArray[np.int64] = records["num_text_tokens"].astype(np.int64) + records["num_instruction_tokens"]
    return tokens
