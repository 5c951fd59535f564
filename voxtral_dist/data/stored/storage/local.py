"""Positioned reads of local files, with a check of the length."""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from voxtral_dist.data.stored.storage.spans import (
    MissingFileError,
    ShortReadError,
    Span,
    StorageError,
    UnreachableError,
    is_unreachable,
)
from voxtral_dist.output.counting import counted

# Of a file that is one recording, which is read as a whole: the limit of WAV's own format.
LARGEST_FILE_BYTES = 2**32
_MAX_OPEN_FILES = 64
_PAUSES_SECONDS = (0.05, 0.5)


def local_path(location: str) -> Path:
    """The path of a local location, which may be a `file://` URL."""
    return Path(re.sub(r"^(file|local)://", "", location))


def read_local(span: Span) -> bytes:
    """The bytes of a span, tried up to three times because shared file systems have hiccups.

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
            f"{span.location} cannot be read at byte {span.offset}: read {counted(len(contents), 'byte')} instead of "
            f"{span.num_bytes}"
        )
    return contents


def open_regular(path: Path, limit_bytes: int | None = None) -> BinaryIO:
    """Open a regular file: reading a pipe or a device such as /dev/zero may never end.

    Raises:
        OSError: it cannot be opened, is something else, or has more bytes than the limit.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is a folder, a pipe or a device", str(path))
    if limit_bytes is not None and status.st_size > limit_bytes:
        raise OSError(errno.EFBIG, f"it has {status.st_size >> 20} MiB, more than {limit_bytes >> 20}", str(path))
    return path.open("rb")


def read_regular(path: Path, limit_bytes: int) -> bytes:
    """The bytes of a regular file; errors as of `open_regular`."""
    with open_regular(path, limit_bytes) as file:
        return file.read()


def advise(span: Span) -> None:
    """Ask the kernel to read a span ahead."""
    # Not every system has it, and a missing file is an error of the read that follows.
    with suppress(OSError, AttributeError):
        file = _open(span.location)
        os.posix_fadvise(file.fileno(), span.offset, span.num_bytes, os.POSIX_FADV_WILLNEED)


def local_error(location: str, error: OSError) -> StorageError:
    """A `StorageError` that names the location."""
    error_type = UnreachableError if is_unreachable(error) else StorageError
    if isinstance(error, FileNotFoundError):
        error_type = MissingFileError
    return error_type(f"{location} cannot be read: {error.strerror or error}")


@lru_cache(maxsize=_MAX_OPEN_FILES)
def _open(location: str) -> BinaryIO:
    # Unbuffered: pread bypasses Python's buffers anyway. Evicted files are closed when their last reference goes.
    return local_path(location).open("rb", buffering=0)
