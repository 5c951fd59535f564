"""What is read, and what is said when it cannot be."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """A run of bytes in a file, for example the tar members of one sample."""

    location: str
    offset: int
    num_bytes: int


class StorageError(OSError):
    """Bytes that could not be had: the sentence names the location, the offset and the cause."""


class MissingFileError(StorageError, FileNotFoundError):
    """There is nothing at this location."""


class ShortReadError(StorageError):
    """Another number of bytes came than was asked for."""


def shown(location: str) -> str:
    """The location without what may be a secret: user, password and query."""
    return re.sub(r"(?<=://)[^/@]*@", "", location.partition("?")[0])
