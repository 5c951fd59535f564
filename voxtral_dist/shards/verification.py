"""A check of a shard set: every utterance is read, decoded and compared with the index."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from voxtral_dist.data.stored.audio import decode_pcm
from voxtral_dist.data.stored.checks import Cause, UnusableError, is_same_duration, unusable_on_failure
from voxtral_dist.data.stored.index import ShardIndex, read_index
from voxtral_dist.data.stored.index_files import read_sets
from voxtral_dist.data.stored.shard_set import RECORD
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.shards.corpus.tar_utterances import tar_utterance
from voxtral_dist.shards.measures import SAMPLING_RATE, UtteranceSpan, index_record, measure
from voxtral_dist.shards.tars.scan import parse_span
from voxtral_dist.shards.workers import ordered_map

# Neighbouring utterances that a worker takes together.
RUN_LENGTH = 64
# The limit was chosen when the set was packed.
_MAX_CHARS_PER_SECOND = math.inf


@dataclass(frozen=True)
class BrokenUtterance:
    """An utterance that is damaged or differs from its index. key: `#NUMBER` if its key cannot be read."""

    shard: str
    key: str
    cause: Cause
    reason: str


@dataclass(frozen=True)
class CheckedRun:
    """The result of checking some neighbouring utterances, up to `last_id`."""

    last_id: int
    broken: tuple[BrokenUtterance, ...]


def verify(folder: str, num_workers: int) -> Iterator[CheckedRun]:
    """Check all utterances of a set in parallel; results are in its order. Its index is compared with its checksum.

    Raises:
        UserError: the folder holds no readable set, or its index is damaged.
        ReadError: a whole shard cannot be read, or the storage fails.
    """
    starts = range(0, len(ShardIndex(read_sets([folder], Storage(), anew=True))), RUN_LENGTH)
    return ordered_map(partial(check_run, folder=folder), starts, num_workers, batch_size=1)


def check_run(first_id: int, folder: str) -> CheckedRun:
    """Check some neighbouring utterances, from `first_id` on."""
    index, storage = opened(folder)
    ids = range(first_id, min(first_id + RUN_LENGTH, len(index)))
    storage.prefetch(index.span(utterance_id) for utterance_id in ids)
    broken = [found for utterance_id in ids if (found := _check(utterance_id, index, storage)) is not None]
    return CheckedRun(ids[-1], tuple(broken))


@lru_cache(maxsize=4)
def opened(folder: str) -> tuple[ShardIndex, Storage]:
    """The index of a set and what reads it, which a worker opens once."""
    storage = Storage()
    return read_index([folder], storage), storage


def _check(utterance_id: int, index: ShardIndex, storage: Storage) -> BrokenUtterance | None:
    span, key = index.span(utterance_id), f"#{utterance_id}"
    try:
        with unusable_on_failure():
            contents = storage.read_indexed(span)
            group = parse_span(contents)
            key = group.key
            utterance = tar_utterance(group, span.location, index.layout(utterance_id))
            pcm = decode_pcm(utterance.audio.contents or b"", SAMPLING_RATE)
            measures = measure(utterance, pcm, _MAX_CHARS_PER_SECOND)
            row = index_record(UtteranceSpan(span.offset, len(contents), zlib.crc32(contents)), measures, [])
            _compare(utterance_id, index, np.array([row], dtype=RECORD)[0], measures.language)
    except UnusableError as error:
        return BrokenUtterance(index.shard(utterance_id).name, key, error.cause, str(error))
    return None


def _compare(utterance_id: int, index: ShardIndex, found: np.void, language: str | None) -> None:
    expected = index.record(utterance_id)
    seconds, expected_seconds = int(found["duration_ms"]) / 1000, int(expected["duration_ms"]) / 1000
    if not is_same_duration(seconds, expected_seconds):
        raise UnusableError(
            Cause.WRONG_LENGTH, f"decodes to {seconds:.2f} s, but its index says {expected_seconds:.2f} s"
        )
    if language != index.language(utterance_id):
        raise UnusableError(
            Cause.WRONG_INDEX, f"has the language {language}, but its index says {index.language(utterance_id)}"
        )
    for name in ("num_chars", "num_text_tokens", "num_instruction_tokens"):
        if found[name] != expected[name]:
            raise UnusableError(Cause.WRONG_INDEX, f"has {name} {found[name]}, but its index says {expected[name]}")
    if found["crc32"] != expected["crc32"]:
        raise UnusableError(Cause.WRONG_INDEX, "has other bytes than when it was indexed: its CRC-32 differs")
