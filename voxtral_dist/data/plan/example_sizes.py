"""What examples cost the model, computed from the records of the index alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.data.stored.shard_set import Records
from voxtral_dist.model.prompts import VoxtralPrompts


@dataclass(frozen=True)
class ExampleSizes:
    """The sizes that decide what an example costs the encoder and the language model.

    window_ms: length of an encoder window in milliseconds.
    audio_tokens_per_window: positions that a window takes in the language model.
    num_prompt_tokens: tokens of a prompt with the longest context, without audio and instruction.
    max_positions: positions of the language model.
    """

    window_ms: int
    audio_tokens_per_window: int
    num_prompt_tokens: int
    max_positions: int

    @classmethod
    def of(cls, prompts: VoxtralPrompts, max_context_tokens: int = 0) -> ExampleSizes:
        """The sizes for the prompts of a checkpoint, whose contexts have at most `max_context_tokens` tokens."""
        return cls(
            window_ms=round(prompts.window_seconds * 1000),
            audio_tokens_per_window=prompts.audio_tokens_per_window,
            num_prompt_tokens=prompts.num_prompt_tokens + max_context_tokens,
            max_positions=prompts.max_positions,
        )

    def windows(self, duration_ms: NDArray[np.integer]) -> NDArray[np.int64]:
        """The number of encoder windows that each example takes, `(n,)`."""
        return np.maximum(1, -(-duration_ms.astype(np.int64) // self.window_ms))

    def positions(self, num_windows: NDArray[np.int64], num_text_tokens: NDArray[np.integer]) -> NDArray[np.int64]:
        """The input positions of each example in the language model: audio, prompt, and text tokens, `(n,)`."""
        return num_windows * self.audio_tokens_per_window + self.num_prompt_tokens + num_text_tokens.astype(np.int64)

    def positions_of(self, records: Records) -> NDArray[np.int64]:
        """The input positions of utterances that each are an example of their own, `(n,)`."""
        return self.positions(self.windows(records["duration_ms"]), text_tokens(records))


def text_tokens(records: Records) -> NDArray[np.int64]:
    """The tokens of instruction and answer, or of the transcript, of each utterance, `(n,)`."""
    tokens: NDArray[np.int64] = records["num_text_tokens"].astype(np.int64) + records["num_instruction_tokens"]
    return tokens
