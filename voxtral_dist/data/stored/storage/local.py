"""Local files by positioned reads, whose length is always checked."""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from voxtral_dist.data.stored.storage.spans import MissingFileError, ShortReadError, Span, StorageError

_MAX_OPEN_FILES = 64
_PAUSES_SECONDS = (0.05, 0.5)


def local_path(location: str) -> Path:
    """The path of a local location, which may be a `file://` URL."""
    return Path(re.sub(r"^(file|local)://", "", location))


def read_local(span: Span) -> bytes:
    """The bytes of the span; shared file systems get some more chances.

    Raises:
        StorageError: the file cannot be read, or ends before the span does.
    """
    for pause_seconds in _PAUSES_SECONDS:
        try:
            return _read_once(span)
        except OSError:
            _open.cache_clear()
            time.sleep(pause_seconds)
    try:
        return _read_once(span)
    except ShortReadError:
        raise
    except OSError as error:
        raise local_error(span.location, error) from error


def _read_once(span: Span) -> bytes:
    file = _open(span.location)
    contents = os.pread(file.fileno(), span.num_bytes, span.offset)
    if len(contents) != span.num_bytes:
        raise ShortReadError(
            f"{span.location} cannot be read at byte {span.offset}: read {len(contents)} bytes instead of "
            f"{span.num_bytes}"
        )
    return contents


def advise(span: Span) -> None:
    """Let the system read the span ahead."""
    # Not on every system; and a file that is missing is an error of the read, not of this.
    with suppress(OSError, AttributeError):
        file = _open(span.location)
        os.posix_fadvise(file.fileno(), span.offset, span.num_bytes, os.POSIX_FADV_WILLNEED)


def local_error(location: str, error: OSError) -> StorageError:
    """The error as a sentence that names the location."""
    sort = MissingFileError if isinstance(error, FileNotFoundError) else StorageError
    return sort(f"{location} cannot be read: {error.strerror or error}")


@lru_cache(maxsize=_MAX_OPEN_FILES)
def _open(location: str) -> BinaryIO:
    # Unbuffered: pread goes past Python's buffers anyway. The cache closes a file by dropping the last reference to it.
    return local_path(location).open("rb", buffering=0)
