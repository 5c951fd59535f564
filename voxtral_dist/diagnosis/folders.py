"""Speeds of a host's folders and of its access to shards."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from voxtral_dist.config import StorageConfig
from voxtral_dist.data.stored.index import read_index
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.errors import UserError, write_reason

_BLOCK_BYTES = 1 << 22
_NUM_UTTERANCES = 8


@dataclass(frozen=True)
class Speed:
    """A measured speed, or why there is none.

    Attributes:
        write: bytes a second, to the disk; None where nothing was written.
        read: bytes a second, from the disk and not from the page cache.
        problem: a sentence.
    """

    write: float | None = None
    read: float | None = None
    problem: str | None = None


def folder_speed(folder: Path, num_bytes: int) -> Speed:
    """Write a file of random bytes, flush it to the disk, drop it from the page cache, read it, and remove it."""
    file = folder / f".doctor-{uuid.uuid4().hex}"
    block = os.urandom(_BLOCK_BYTES)
    num_blocks = max(1, num_bytes // _BLOCK_BYTES)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            started = time.monotonic()
            with file.open("wb") as output:
                for _ in range(num_blocks):
                    output.write(block)
                output.flush()
                os.fsync(output.fileno())
                os.posix_fadvise(output.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            written = time.monotonic()
            with file.open("rb", buffering=0) as source:
                while source.read(_BLOCK_BYTES):
                    pass
            ended = time.monotonic()
        finally:
            file.unlink(missing_ok=True)
    except OSError as error:
        return Speed(problem=f"{folder} cannot be written: {write_reason(error)}")
    num_written = num_blocks * _BLOCK_BYTES
    return Speed(write=num_written / (written - started), read=num_written / (ended - written))


def shard_speed(shards: Sequence[str], storage: StorageConfig) -> Speed:
    """Read some utterances of shard sets, spread over them, and compare them with their checksums."""
    reader = Storage(storage)
    try:
        index = read_index(shards, reader)
        utterance_ids = np.unique(np.linspace(0, len(index) - 1, _NUM_UTTERANCES).astype(int)).tolist()
        num_bytes, seconds = 0, 0.0
        for utterance_id in utterance_ids:
            started = time.monotonic()
            contents = reader.read(index.span(utterance_id))
            seconds += time.monotonic() - started
            num_bytes += len(contents)
            index.parse(utterance_id, contents)
    except (UserError, OSError, ValueError) as error:
        return Speed(problem=f"the shards {', '.join(shards[:3])} cannot be read: {error}")
    return Speed(read=num_bytes / seconds)
