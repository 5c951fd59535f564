"""Filters: which utterances are not drawn, decided by the records of the index alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.config import TrainDataConfig
from voxtral_dist.data.plan.example_sizes import ExampleSizes
from voxtral_dist.data.stored.index import RecordChunk, ShardIndex
from voxtral_dist.data.stored.shard_set import Records

Mask = NDArray[np.bool_]

# Reasons follow a number of utterances: "12 with more tokens than `max_target_tokens`".
TOO_MANY_TARGET_TOKENS = "with more tokens than `max_target_tokens`"
TOO_MANY_POSITIONS = "with more positions than the model has"
_TOO_LARGE = "larger than the budget of a micro-batch"


@dataclass(frozen=True)
class Filters:
    """The filters of a training set.

    config: limits of duration, text and language, and the budget of a micro-batch.
    sizes: what examples cost.
    languages: the names of the languages that `RecordChunk.languages` numbers.
    """

    config: TrainDataConfig
    sizes: ExampleSizes
    languages: tuple[str, ...]

    def refused(self, chunk: RecordChunk) -> Iterator[tuple[str, Mask]]:
        """Yield each reason to skip, with the mask of the records that it applies to; a record can have several."""
        config, duration_ms = self.config, chunk.records["duration_ms"]
        if config.max_duration_seconds is not None:
            yield "longer than `max_duration_seconds`", duration_ms > round(1000 * config.max_duration_seconds)
        if config.min_duration_seconds is not None:
            yield "shorter than `min_duration_seconds`", duration_ms < round(1000 * config.min_duration_seconds)
        # The length of an answer to an instruction does not depend on the length of the audio.
        if config.max_chars_per_second is not None:
            too_many = chunk.records["num_chars"] > config.max_chars_per_second / 1000 * duration_ms
            yield "with more than `max_chars_per_second`", too_many & _are_transcripts(chunk.records)
        if config.min_chars_per_second is not None:
            too_few = chunk.records["num_chars"] < config.min_chars_per_second / 1000 * duration_ms
            yield "with fewer than `min_chars_per_second`", too_few & _are_transcripts(chunk.records)
        if config.languages is not None:
            is_wanted = np.zeros(2**16, dtype=bool)
            is_wanted[[number for number, name in enumerate(self.languages) if name in config.languages]] = True
            yield "not in `languages`", ~is_wanted[chunk.languages]
        yield from self._too_long(chunk.records)
        yield from self._too_large(chunk.records)

    def can_refuse(self, index: ShardIndex) -> bool:
        """Whether any utterance might be skipped, decided without reading the records."""
        config = self.config
        limits = (config.min_duration_seconds, config.max_chars_per_second, config.min_chars_per_second)
        if any(limit is not None for limit in limits) or config.languages is not None:
            return True
        longest = max(part.longest_seconds for part in index.sets)
        bounds = np.zeros(1, dtype=index.sets[0].records.dtype)
        bounds["duration_ms"] = min(2**32 - 1, round(longest * 1000))
        bounds["num_text_tokens"] = max(part.most_text_tokens for part in index.sets)
        bounds["num_instruction_tokens"] = max(part.most_instruction_tokens for part in index.sets)
        return any(mask.any() for _, mask in self.refused(RecordChunk(0, bounds, bounds["language"])))

    def _too_long(self, records: Records) -> Iterator[tuple[str, Mask]]:
        # The steps of `target_text` change the number of tokens: the reader checks their result.
        if not self.config.target_text:
            yield TOO_MANY_TARGET_TOKENS, records["num_text_tokens"] >= self.config.max_target_tokens
        yield TOO_MANY_POSITIONS, self.sizes.positions_of(records) > self.sizes.max_positions

    def _too_large(self, records: Records) -> Iterator[tuple[str, Mask]]:
        if self.config.max_windows is not None:
            yield _TOO_LARGE, records["duration_ms"] > self.config.max_windows * self.sizes.window_ms
        if self.config.max_tokens is not None:
            yield _TOO_LARGE, self.sizes.positions_of(records) > self.config.max_tokens


def _are_transcripts(records: Records) -> Mask:
    are_transcripts: Mask = records["num_instruction_tokens"] == 0
    return are_transcripts
