"""Bytes of local files and of URLs."""

from voxtral_dist.data.stored.storage.local import LARGEST_FILE_BYTES, local_path, open_regular, read_regular
from voxtral_dist.data.stored.storage.spans import (
    MissingFileError,
    ShortReadError,
    Span,
    StorageError,
    UnreachableError,
    is_unreachable,
    read_error,
)
from voxtral_dist.data.stored.storage.storage import Storage, is_remote, join

__all__ = [
    "LARGEST_FILE_BYTES",
    "MissingFileError",
    "ShortReadError",
    "Span",
    "Storage",
    "StorageError",
    "UnreachableError",
    "is_remote",
    "is_unreachable",
    "join",
    "local_path",
    "open_regular",
    "read_error",
    "read_regular",
]
