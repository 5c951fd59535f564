"""The files of a cache that several processes share: their checksums, their locks, and their sum of bytes."""

from __future__ import annotations

import fcntl
import os
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np

# Each block of a chunk has a checksum behind the chunk, so that reading a part of it checks this part only.
_BLOCK_BYTES = 64 << 10
_CHECKSUM_BYTES = 4


def write_at(descriptor: int, contents: bytes, offset: int) -> None:
    """Write all of it, or raise the `OSError` that says why not."""
    rest = memoryview(contents)
    while rest:
        num_written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[num_written:], offset + num_written


def chunk_file_bytes(length: int) -> int:
    """The size of the file of a chunk of this length, with its checksums."""
    return length + _CHECKSUM_BYTES * -(-length // _BLOCK_BYTES)


def checksums(contents: bytes) -> bytes:
    """What is written behind a chunk: CRC-32 of each block."""
    starts = range(0, len(contents), _BLOCK_BYTES)
    view = memoryview(contents)
    return np.array([zlib.crc32(view[start : start + _BLOCK_BYTES]) for start in starts], dtype="<u4").tobytes()


def checked(descriptor: int, length: int, part: slice) -> bytes | None:
    """A part of a chunk, or None if its checksums don't agree."""
    if os.fstat(descriptor).st_size != chunk_file_bytes(length):
        return None
    first, stop = part.start // _BLOCK_BYTES, -(-part.stop // _BLOCK_BYTES)
    start = first * _BLOCK_BYTES
    blocks = os.pread(descriptor, min(stop * _BLOCK_BYTES, length) - start, start)
    expected = os.pread(descriptor, (stop - first) * _CHECKSUM_BYTES, length + first * _CHECKSUM_BYTES)
    return blocks[part.start - start : part.stop - start] if checksums(blocks) == expected else None


def files(folder: Path) -> list[tuple[float, int, str]]:
    """Time of the last use, size and path of each file."""
    found = []
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):
            status = entry.stat()
            found.append((status.st_mtime, status.st_size, entry.path))
    return found


def remove_unlocked(files: list[tuple[float, int, str]], surplus: float = float("inf")) -> int:
    """The number of bytes that were freed by removing files in this order, at least `surplus` if possible."""
    freed = 0
    for _, num_bytes, path in files:
        if freed >= surplus:
            break
        with suppress(OSError):
            freed += num_bytes if _remove_if_unlocked(Path(path)) else 0
    return freed


def _remove_if_unlocked(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if not try_lock(descriptor) or not is_at(descriptor, path):
            return False
        path.unlink()
        return True
    finally:
        unlock(descriptor)


def try_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Whether the file could be locked at once; the lock ends with the descriptor."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(descriptor: int) -> None:
    """End the lock and close the file."""
    # Closing alone keeps the lock while a forked process has the descriptor too.
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one that has this path now."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def read_number(descriptor: int) -> int | None:
    """The number in a file; None if there is none."""
    digits = os.pread(descriptor, 32, 0).strip()
    return int(digits) if digits.isdigit() else None


def write_number(descriptor: int, number: int) -> None:
    """Replace the number in a file."""
    os.pwrite(descriptor, f"{max(0, number):<31d}\n".encode(), 0)
