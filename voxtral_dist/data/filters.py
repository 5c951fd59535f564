"""What examples cost the model, and which samples are not drawn: judged on the records of the index alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.config import TrainDataConfig
from voxtral_dist.data.index import RecordChunk, Records, ShardIndex
from voxtral_dist.data.prompts import TranscriptionPrompts

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class ExampleSizes:
    """What examples cost the model, from their records alone.

    window_ms: the length of a window. num_prompt_tokens: of a prompt, besides its audio tokens.
    """

    window_ms: int
    audio_tokens_per_window: int
    num_prompt_tokens: int

    @classmethod
    def of(cls, prompts: TranscriptionPrompts) -> ExampleSizes:
        """The sizes of one checkpoint's windows and prompts; a prompt with a language is the longer one."""
        window_tokens = prompts.audio_tokens_per_window
        longest = max(len(prompts.prompt(language, 1)) for language in (None, "en"))
        return cls(round(prompts.window_seconds * 1000), window_tokens, longest - window_tokens)

    def windows(self, duration_ms: NDArray[np.integer]) -> NDArray[np.int64]:
        """Windows that clips fill: what the encoder pays."""
        return np.maximum(1, -(-duration_ms.astype(np.int64) // self.window_ms))

    def positions(self, num_windows: NDArray[np.int64], num_text_tokens: NDArray[np.integer]) -> NDArray[np.int64]:
        """Input positions of the language model: audio tokens, prompt and transcript."""
        return num_windows * self.audio_tokens_per_window + self.num_prompt_tokens + num_text_tokens.astype(np.int64)


@dataclass(frozen=True)
class Filters:
    """What is not drawn, and why, by the limits of the configuration."""

    config: TrainDataConfig
    sizes: ExampleSizes
    languages: tuple[str, ...]

    def refused(self, chunk: RecordChunk) -> dict[str, Mask]:
        """By reason, which records of the chunk are refused; a record may have several reasons."""
        config, records = self.config, chunk.records
        seconds = records["duration_ms"] / 1000.0
        refused = {
            "longer than `max_duration_seconds`": _above(seconds, config.max_duration_seconds),
            "shorter than `min_duration_seconds`": _below(seconds, config.min_duration_seconds),
            "more than `max_chars_per_second`": _above(_rate(records), config.max_chars_per_second),
            "fewer than `min_chars_per_second`": _below(_rate(records), config.min_chars_per_second),
            "not in `languages`": self._other_language(chunk),
            "larger than a micro-batch may be": self._oversized(records),
        }
        return {reason: mask for reason, mask in refused.items() if mask is not None}

    def can_refuse(self, index: ShardIndex) -> bool:
        """Whether any sample might be refused, judged without looking at the records."""
        config = self.config
        limits = (config.min_duration_seconds, config.max_chars_per_second, config.min_chars_per_second)
        if any(limit is not None for limit in limits) or config.languages is not None:
            return True
        longest = max(part.longest_seconds for part in index.sets)
        bounds = np.zeros(1, dtype=index.sets[0].records.dtype)
        bounds["duration_ms"] = min(2**32 - 1, round(longest * 1000))
        bounds["num_text_tokens"] = max(part.most_text_tokens for part in index.sets)
        return any(mask.any() for mask in self.refused(RecordChunk(0, bounds, bounds["language"])).values())

    def _other_language(self, chunk: RecordChunk) -> Mask | None:
        if self.config.languages is None:
            return None
        wanted = [number for number, name in enumerate(self.languages) if name in self.config.languages]
        return ~np.isin(chunk.languages, wanted)

    def _oversized(self, records: Records) -> Mask | None:
        windows = self.sizes.windows(records["duration_ms"])
        positions = self.sizes.positions(windows, records["num_text_tokens"])
        above = (_above(windows, self.config.max_windows), _above(positions, self.config.max_tokens))
        masks = [mask for mask in above if mask is not None]
        return np.logical_or.reduce(masks) if masks else None


def _rate(records: Records) -> NDArray[np.float64]:
    """Characters per second."""
    rate: NDArray[np.float64] = records["num_chars"] / np.maximum(records["duration_ms"] / 1000.0, 1e-3)
    return rate


def _above(values: NDArray[Any], limit: float | None) -> Mask | None:
    return None if limit is None else values > limit


def _below(values: NDArray[Any], limit: float | None) -> Mask | None:
    return None if limit is None else values < limit
