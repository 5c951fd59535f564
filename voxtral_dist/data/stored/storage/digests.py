"""Checksums of large files, computed once per node."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LARGEST_ENTRY_BYTES = 4096
# Times of files advance in steps: a file that changed just now may change again without another time.
_SETTLED_SECONDS = 2.0


class NodeDigests:
    """SHA-256 checksums in a folder that all processes of a node share.

    An entry is valid while device, inode, size, and the times of the last change of contents and of attributes stay
    the same. While a process computes a checksum, the others that want it wait. Where the folder cannot be written, or
    its file system has no locks, every process computes for itself.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def digest(self, path: Path, start: int, *, anew: bool = False) -> str:
        """The hex digest of a file from byte `start` on; `anew` computes it even where it is known.

        Raises:
            OSError: the file cannot be read.
        """
        with path.open("rb", buffering=0) as file, self._entry(path, start) as entry:
            status = os.fstat(file.fileno())
            identity = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
            known = None if anew else _read(entry, identity)
            if known is not None:
                return known
            file.seek(start)
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if time.time() - max(status.st_mtime, status.st_ctime) > _SETTLED_SECONDS:
                _write(entry, {"identity": identity, "sha256": found})
            return found

    @contextmanager
    def _entry(self, path: Path, start: int) -> Iterator[int | None]:
        """The locked file of an entry; None where there can be none."""
        # A home folder may be shared by nodes whose devices and inodes have equal numbers.
        name = hashlib.sha256(repr((socket.gethostname(), str(path.resolve()), start)).encode()).hexdigest()[:32]
        entry = None
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            entry = os.open(self._folder / f"{name}.json", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(entry, fcntl.LOCK_EX)
        try:
            yield entry
        finally:
            if entry is not None:
                os.close(entry)


def _read(entry: int | None, identity: list[int]) -> str | None:
    if entry is None:
        return None
    with suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(os.pread(entry, _LARGEST_ENTRY_BYTES, 0))
        if stored["identity"] == identity:
            return str(stored["sha256"])
    return None


def _write(entry: int | None, contents: dict[str, object]) -> None:
    if entry is not None:
        with suppress(OSError):
            os.ftruncate(entry, 0)
            os.pwrite(entry, json.dumps(contents).encode(), 0)
