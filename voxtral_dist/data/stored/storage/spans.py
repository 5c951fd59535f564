"""What a storage reads, and the errors of reading it."""

from __future__ import annotations

import errno
from dataclasses import dataclass

from voxtral_dist.errors import ReadError, first_line
from voxtral_dist.output.masking import masked

# Of a disk that fails, or a shared file system whose server is gone: not of one file.
_UNREACHABLE = {
    errno.EIO,
    errno.ESTALE,
    errno.ENODEV,
    errno.ENXIO,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.ESHUTDOWN,
    errno.EREMOTEIO,
}


@dataclass(frozen=True)
class Span:
    """A run of bytes in a file, for example the tar members of one utterance."""

    location: str
    offset: int
    num_bytes: int


class StorageError(OSError):
    """Bytes could not be read. The message names the location, the offset and the cause."""


class MissingFileError(StorageError, FileNotFoundError):
    """There is no file or folder at the location."""


class ShortReadError(StorageError):
    """Fewer or more bytes were read than requested."""


class UnreachableError(StorageError):
    """The storage failed, and not one file in it: no connection, no answer in time, an error of its server or disk."""


def is_unreachable(error: BaseException) -> bool:
    """Whether an error is that of a storage, so that other files in it cannot be read either."""
    return isinstance(error, UnreachableError) or (isinstance(error, OSError) and error.errno in _UNREACHABLE)


def read_error(error: OSError) -> ReadError:
    """What ends a command that cannot read its data for a reason that no utterance has; `error` names the location."""
    return ReadError(
        f"{first_line(error)}. Its storage fails, and not one utterance, so none is skipped: fix that, and rerun the "
        "same command to resume."
    )


def redacted(location: str) -> str:
    """The location for messages: without password, token and query."""
    return masked(location.partition("?")[0])
