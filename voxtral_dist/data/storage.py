"""Bytes of a sample from its shard: positioned reads of local files, whose length is always checked."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

_MAX_OPEN_SHARDS = 64
_PAUSES_SECONDS = (0.05, 0.5)


@dataclass(frozen=True)
class Span:
    """Where the tar members of one sample lie."""

    location: str
    offset: int
    num_bytes: int


class Storage:
    """Reads local files."""

    def read(self, span: Span) -> bytes:
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

    def prefetch(self, spans: Iterable[Span]) -> None:
        """Nothing yet."""

    def read_all(self, location: str) -> bytes:
        """A whole file."""
        return Path(location).read_bytes()

    def local_copy(self, location: str) -> Path:
        """The file itself."""
        return Path(location)

    def sizes(self, folder: str) -> dict[str, int]:
        """Of the files of a folder, by name."""
        return {entry.name: entry.stat().st_size for entry in os.scandir(folder) if entry.is_file()}

    def expand(self, pattern: str) -> list[str]:
        """The names that a pattern stands for."""
        return [pattern]


def join(folder: str, name: str) -> str:
    """The location of a file in a folder."""
    return f"{folder.rstrip('/')}/{name}"


def is_remote(location: str) -> bool:
    """Whether a location is a URL."""
    return "://" in location


def _read_once(span: Span) -> bytes:
    contents = os.pread(_open(span.location).fileno(), span.num_bytes, span.offset)
    if len(contents) != span.num_bytes:
        raise OSError(
            f"read {len(contents)} bytes instead of {span.num_bytes} at {span.offset} of {Path(span.location).name}"
        )
    return contents


@lru_cache(maxsize=_MAX_OPEN_SHARDS)
def _open(location: str) -> BinaryIO:
    # Unbuffered: pread goes past Python's buffers anyway. The cache closes a file by dropping the last reference to it.
    return Path(location).open("rb", buffering=0)
