"""What a storage reads, and the errors of reading it."""

from __future__ import annotations

from dataclasses import dataclass

from voxtral_dist.output.masking import masked


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


def redacted(location: str) -> str:
    """The location for messages: without password, token and query."""
    return masked(location.partition("?")[0])
