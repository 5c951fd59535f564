"""Files of a cache that processes share: checksums, locks, and the count of bytes in use."""

from __future__ import annotations

import fcntl
import os
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np

# The checksums of a chunk's blocks follow the chunk, so that reading a part of it verifies only that part.
_BLOCK_BYTES = 64 << 10
_CHECKSUM_BYTES = 4


def write_at(descriptor: int, contents: bytes, offset: int) -> None:
    """Write all bytes at an offset.

    Raises:
        OSError: not all could be written.
    """
    rest = memoryview(contents)
    while rest:
        num_written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[num_written:], offset + num_written


def chunk_file_bytes(length: int) -> int:
    """The file size of a chunk of this length, checksums included."""
    return length + _CHECKSUM_BYTES * -(-length // _BLOCK_BYTES)


def checksums(contents: bytes) -> bytes:
    """The CRC-32 of each block of a chunk, as they follow it in its file."""
    starts = range(0, len(contents), _BLOCK_BYTES)
    view = memoryview(contents)
    return np.array([zlib.crc32(view[start : start + _BLOCK_BYTES]) for start in starts], dtype="<u4").tobytes()


def read_verified(descriptor: int, length: int, part: slice) -> bytes | None:
    """A part of a chunk; None if its checksums or the file size are wrong."""
    if os.fstat(descriptor).st_size != chunk_file_bytes(length):
        return None
    first, stop = part.start // _BLOCK_BYTES, -(-part.stop // _BLOCK_BYTES)
    start = first * _BLOCK_BYTES
    blocks = os.pread(descriptor, min(stop * _BLOCK_BYTES, length) - start, start)
    expected = os.pread(descriptor, (stop - first) * _CHECKSUM_BYTES, length + first * _CHECKSUM_BYTES)
    return blocks[part.start - start : part.stop - start] if checksums(blocks) == expected else None


def list_files(folder: Path) -> list[tuple[float, int, str]]:
    """Time of last use, size and path of each file."""
    found = []
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):
            status = entry.stat()
            found.append((status.st_mtime, status.st_size, entry.path))
    return found


def remove_unlocked(files: list[tuple[float, int, str]], surplus: float = float("inf")) -> int:
    """Remove files that nobody has locked, in this order, until `surplus` bytes are freed; return the number freed."""
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
    """Lock a file without waiting, until its descriptor is closed; return whether that succeeded."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(descriptor: int) -> None:
    """Release the lock and close the file."""
    # Closing doesn't release the lock while a forked process has the descriptor open.
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at this path."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def read_number(descriptor: int) -> int | None:
    """The number in a file; None if it has none."""
    digits = os.pread(descriptor, 32, 0).strip()
    return int(digits) if digits.isdigit() else None


def write_number(descriptor: int, number: int) -> None:
    """Replace the number in a file."""
    os.pwrite(descriptor, f"{max(0, number):<31d}\n".encode(), 0)
