"""A folder on a node's disk that holds pieces of remote files: fetched once for all processes, within a limit of bytes.

`entries/` holds finished files, `partial/` those that are being written, and `usage` the number of bytes of both, which
is also the lock under which files come and go. Whoever writes a partial file holds a lock on it, so one without a lock
belongs to a process that was killed: the next one that needs it writes it anew, and any clean-up removes it. A partial
file has its full size from the start, so sizes add up at any time. Finished files are locked by who relies on their
paths, and are not removed then.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from voxtral_dist.data.stored.storage.cache_files import (
    checked,
    checksums,
    chunk_file_bytes,
    files,
    is_at,
    read_number,
    remove_unlocked,
    try_lock,
    unlock,
    write_at,
    write_number,
)
from voxtral_dist.data.stored.storage.remote import RemoteFile
from voxtral_dist.data.stored.storage.spans import StorageError, shown
from voxtral_dist.errors import UserError

# A clean-up goes below the limit, so that not every new chunk needs one.
_CLEAN_TO = 0.9
_PAUSE_SECONDS = 0.01
_FULL_PAUSE_SECONDS = 10.0

log = logging.getLogger(__name__)


class NodeCache:
    """Chunks and whole copies of remote files in a folder that all processes of a node share."""

    def __init__(self, folder: Path, limit_bytes: int, chunk_bytes: int, patience_seconds: float) -> None:
        """
        Args:
            folder: made if it doesn't exist.
            limit_bytes: of all files in it.
            chunk_bytes: what is fetched at a time.
            patience_seconds: how long to wait for another process that writes nothing.

        Raises:
            UserError: the folder cannot be made.
        """
        self._folder = folder
        self._entries, self._parts = folder / "entries", folder / "partial"
        self._limit_bytes = limit_bytes
        self._chunk_bytes = chunk_bytes
        self._patience_seconds = patience_seconds
        self._held: dict[Path, int] = {}
        self._warned = False
        self._full_until = 0.0
        try:
            self._entries.mkdir(parents=True, exist_ok=True)
            self._parts.mkdir(exist_ok=True)
            with self._usage() as usage:
                self._remove_abandoned(usage)
        except OSError as error:
            raise UserError(
                f"`storage.cache_dir` must be a folder that this process can write to, but {folder} is not one "
                f"({error.strerror or error})."
            ) from error

    def read(self, file: RemoteFile, offset: int, num_bytes: int, fetch: Callable[[int, int], bytes]) -> bytes:
        """The bytes of a span that lies inside the file; `fetch(offset, num_bytes)` gets what is missing.

        Trouble with the disk is no error: then the span is fetched and nothing is kept.
        """
        pieces, end = [], offset + num_bytes
        while offset < end:
            index, begin = divmod(offset, self._chunk_bytes)
            stop = min(begin + end - offset, self._chunk_bytes)
            pieces.append(self._read_chunk(file, index, slice(begin, stop), fetch))
            offset += stop - begin
        return b"".join(pieces)

    def copy(self, file: RemoteFile, num_bytes: int, basename: str, fill: Callable[[int], None]) -> Path:
        """The path of a whole copy, which stays as long as this process; `fill(descriptor)` writes what is missing.

        Raises:
            StorageError: there is no room for it, or another process stalls while it writes it.
        """
        path = self._entries / f"{file.key}-{basename}"
        try:
            while not self._hold(path, num_bytes):
                self._write(path.name, num_bytes, fill, is_copy=True)
        except StorageError:
            raise
        except OSError as error:
            reason = error.strerror or error
            raise StorageError(f"{shown(file.location)} cannot be copied to {self._folder}: {reason}") from error
        return path

    def _read_chunk(self, file: RemoteFile, index: int, part: slice, fetch: Callable[[int, int], bytes]) -> bytes:
        start = index * self._chunk_bytes
        assert file.num_bytes is not None
        length = min(self._chunk_bytes, file.num_bytes - start)
        name = f"{file.key}-{self._chunk_bytes}-{index:06d}"
        fetched: list[bytes] = []

        def fill(descriptor: int) -> None:
            fetched.append(fetch(start, length))
            write_at(descriptor, fetched[0] + checksums(fetched[0]), 0)

        try:
            while not fetched:
                stored = self._stored(name, length, part)
                if stored is not None:
                    return stored
                if time.monotonic() < self._full_until:
                    break
                self._write(name, chunk_file_bytes(length), fill, is_copy=False)
        except StorageError:
            raise
        except OSError as error:
            self._warn(error)
        return fetched[0][part] if fetched else fetch(start + part.start, part.stop - part.start)

    def _stored(self, name: str, length: int, part: slice) -> bytes | None:
        """A part of a chunk, or None if the chunk is not there; a damaged one is removed."""
        path = self._entries / name
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            contents = checked(descriptor, length, part)
            with suppress(OSError):
                os.utime(descriptor)  # The time of the last use decides what is removed.
        finally:
            os.close(descriptor)
        if contents is None:
            log.warning("The file %s of the cache is damaged; it is fetched again.", path)
            self._remove(path)
        return contents

    def _hold(self, path: Path, num_bytes: int) -> bool:
        """Whether the copy is there; it is locked for the life of this process, so that no clean-up removes it."""
        if path in self._held and is_at(self._held[path], path):
            return True
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        is_whole = os.fstat(descriptor).st_size == num_bytes
        if is_whole and try_lock(descriptor, fcntl.LOCK_SH) and is_at(descriptor, path):
            os.utime(descriptor)
            self._held[path] = descriptor
            return True
        unlock(descriptor)
        if not is_whole:
            self._remove(path)
        time.sleep(_PAUSE_SECONDS)
        return False

    def _write(self, name: str, num_bytes: int, fill: Callable[[int], None], is_copy: bool) -> None:
        """Make the entry, or wait until another process has made it."""
        descriptor = self._claim(name, num_bytes, is_copy)
        if descriptor is None:
            return
        part = self._parts / name
        try:
            fill(descriptor)
            if is_copy:
                os.fsync(descriptor)
            part.rename(self._entries / name)
        except BaseException:
            self._remove(part)
            raise
        finally:
            unlock(descriptor)

    def _claim(self, name: str, num_bytes: int, is_copy: bool) -> int | None:
        """A descriptor of the partial file that is ours to write; None once the entry exists."""
        entry, part = self._entries / name, self._parts / name
        patient_until = time.monotonic() + self._patience_seconds
        while not entry.exists():
            try:
                descriptor = os.open(part, os.O_RDWR)
            except FileNotFoundError:
                self._create(entry, part, num_bytes)
                continue
            if try_lock(descriptor) and is_at(descriptor, part):
                os.ftruncate(descriptor, num_bytes)
                return descriptor
            # A copy takes its time, but then its file changes; a chunk is written at once.
            is_moving = is_copy and time.time() - os.fstat(descriptor).st_mtime < self._patience_seconds
            os.close(descriptor)
            if time.monotonic() > patient_until and not is_moving:
                raise OSError(errno.ETIMEDOUT, "another process of this node fetches it, but doesn't get on")
            time.sleep(_PAUSE_SECONDS)
        return None

    def _create(self, entry: Path, part: Path, num_bytes: int) -> None:
        """Make room for a partial file, and make it at its full size; whoever locks it first writes it."""
        with self._usage() as usage:
            if entry.exists() or part.exists():
                return
            used = read_number(usage)
            if used is None or used + num_bytes > self._limit_bytes:
                used = self._scan(clean_to=self._limit_bytes - num_bytes)
                write_number(usage, used)
            if used + num_bytes > self._limit_bytes:
                raise OSError(errno.ENOSPC, f"`storage.cache_gigabytes` leaves no room for {num_bytes} bytes")
            write_number(usage, used + num_bytes)  # First: a process killed in between leaves too high a number.
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            os.ftruncate(descriptor, num_bytes)
            os.close(descriptor)

    def _scan(self, clean_to: int) -> int:
        """The bytes of all files, after those that were not used for the longest time were removed down to `clean_to`,
        and what killed processes left."""
        remove_unlocked(files(self._parts))
        # Parts first: one that is finished and moved in between is found twice then, and not missed.
        parts, entries = files(self._parts), sorted(files(self._entries))
        sizes = {Path(path).name: size for _, size, path in parts + entries}
        total = sum(sizes.values())
        if total <= clean_to:
            return total
        surplus = total - min(clean_to, int(self._limit_bytes * _CLEAN_TO))
        return total - remove_unlocked(entries, surplus)

    def _remove_abandoned(self, usage: int) -> None:
        """Remove what killed processes left; count anew if nobody has counted yet."""
        used = read_number(usage)
        freed = remove_unlocked(files(self._parts))
        write_number(usage, self._scan(self._limit_bytes) if used is None else used - freed)

    def _remove(self, path: Path) -> None:
        with self._usage() as usage, suppress(FileNotFoundError):
            num_bytes = path.stat().st_size
            path.unlink()
            write_number(usage, (read_number(usage) or 0) - num_bytes)

    @contextmanager
    def _usage(self) -> Iterator[int]:
        """The descriptor of the file with the number of bytes in use, locked."""
        descriptor = os.open(self._folder / "usage", os.O_RDWR | os.O_CREAT, 0o666)
        patient_until = time.monotonic() + self._patience_seconds
        try:
            while not try_lock(descriptor):
                if time.monotonic() > patient_until:
                    raise OSError(errno.ETIMEDOUT, f"{self._folder / 'usage'} stays locked")
                time.sleep(_PAUSE_SECONDS)
            yield descriptor
        finally:
            unlock(descriptor)

    def _warn(self, error: OSError) -> None:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            self._full_until = time.monotonic() + _FULL_PAUSE_SECONDS
        if not self._warned:
            self._warned = True
            reason = error.strerror or error
            log.warning("The cache %s cannot be used (%s); remote files are read without it.", self._folder, reason)
