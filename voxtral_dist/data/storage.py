"""Bytes of a sample from its shard: positioned reads of local files, whose length is always checked."""

from __future__ import annotations

import os
import time
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from voxtral_dist.data.index import SampleSpan

_MAX_OPEN_SHARDS = 64
_PAUSES_SECONDS = (0.05, 0.5)


def read_span(span: SampleSpan) -> bytes:
    """The bytes of the span; shared file systems get some more chances.

    Raises:
        OSError: the file cannot be read, or ends before the span does.
    """
    for pause_seconds in _PAUSES_SECONDS:
        try:
            return _read_once(span)
        except OSError:
            _open.cache_clear()
            time.sleep(pause_seconds)
    return _read_once(span)


def _read_once(span: SampleSpan) -> bytes:
    contents = os.pread(_open(span.path).fileno(), span.num_bytes, span.offset)
    if len(contents) != span.num_bytes:
        raise OSError(f"read {len(contents)} bytes instead of {span.num_bytes} at {span.offset} of {span.path.name}")
    return contents


@lru_cache(maxsize=_MAX_OPEN_SHARDS)
def _open(path: Path) -> BinaryIO:
    # Unbuffered: pread goes past Python's buffers anyway. The cache closes a file by dropping the last reference to it.
    return path.open("rb", buffering=0)
