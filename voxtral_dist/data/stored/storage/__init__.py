"""Bytes of local files and of URLs."""

from voxtral_dist.data.stored.storage.spans import MissingFileError, ShortReadError, Span, StorageError
from voxtral_dist.data.stored.storage.storage import Storage, is_remote, join

__all__ = ["MissingFileError", "ShortReadError", "Span", "Storage", "StorageError", "is_remote", "join"]
