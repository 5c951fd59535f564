"""A cache of remote files on a node's disk: each piece is fetched once for all processes, up to a limit of bytes.

`entries/` holds finished files and `partial/` those being written. `usage` holds the number of bytes of both; a lock on
it is required to add or remove files. A process locks the partial file that it writes, so an unlocked one was left by a
killed process: the next process that needs it rewrites it, and any cleanup removes it. A partial file is allocated at
its full size, so `usage` is right at any time. A process that uses the path of a finished file holds a shared lock on
it, which keeps it from being removed.
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
    checksums,
    chunk_file_bytes,
    is_at,
    list_files,
    read_number,
    read_verified,
    remove_unlocked,
    try_lock,
    unlock,
    write_at,
    write_number,
)
from voxtral_dist.data.stored.storage.remote import RemoteFile
from voxtral_dist.data.stored.storage.spans import StorageError, redacted
from voxtral_dist.errors import UserError
from voxtral_dist.output.counting import counted

# A cleanup frees more than needed, so that not every new chunk needs another.
_CLEAN_TO = 0.9
_PAUSE_SECONDS = 0.01
_FULL_PAUSE_SECONDS = 10.0

log = logging.getLogger(__name__)


class NodeCache:
    """Chunks and whole copies of remote files, in a folder that all processes of a node share."""

    def __init__(self, folder: Path, limit_bytes: int, chunk_bytes: int, patience_seconds: float) -> None:
        """
        Args:
            folder: created if it doesn't exist.
            limit_bytes: maximum total size of the files in it.
            chunk_bytes: size of a fetch.
            patience_seconds: how long to wait for another process that makes no progress.

        Raises:
            UserError: the folder cannot be created.
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
                f"`storage.cache_dir` must be a folder that this process can write to, but {folder} is not "
                f"({error.strerror or error})."
            ) from error

    def read(self, file: RemoteFile, offset: int, num_bytes: int, fetch: Callable[[int, int], bytes]) -> bytes:
        """Read bytes of a file; `fetch(offset, num_bytes)` gets those that are not in the cache.

        The span must lie inside the file. A disk error is not raised: the bytes are fetched and not kept.
        """
        pieces, end = [], offset + num_bytes
        while offset < end:
            index, begin = divmod(offset, self._chunk_bytes)
            stop = min(begin + end - offset, self._chunk_bytes)
            pieces.append(self._read_chunk(file, index, slice(begin, stop), fetch))
            offset += stop - begin
        return b"".join(pieces)

    def copy(self, file: RemoteFile, num_bytes: int, basename: str, fill: Callable[[int], None]) -> Path:
        """The path of a whole copy, kept while this process lives; `fill(descriptor)` writes it if it is missing.

        Raises:
            StorageError: there is no room for it, or the process that writes it makes no progress.
        """
        path = self._entries / f"{file.key}-{basename}"
        try:
            while not self._hold(path, num_bytes):
                self._write(path.name, num_bytes, fill, is_copy=True)
        except StorageError:
            raise
        except OSError as error:
            reason = error.strerror or error
            raise StorageError(f"{redacted(file.location)} cannot be copied to {self._folder}: {reason}") from error
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
        """A part of a chunk; None if the chunk is missing or damaged. A damaged one is removed."""
        path = self._entries / name
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            contents = read_verified(descriptor, length, part)
            with suppress(OSError):
                os.utime(descriptor)  # Cleanup removes the least recently used.
        finally:
            os.close(descriptor)
        if contents is None:
            log.warning("The cache file %s is damaged and will be fetched again.", path)
            self._remove(path)
        return contents

    def _hold(self, path: Path, num_bytes: int) -> bool:
        """Whether the copy exists. If so, lock it until this process ends, so that no cleanup removes it."""
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
        """Write the entry, or wait until another process has written it."""
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
        """A descriptor of the partial file, locked for writing; None if another process finished the entry."""
        entry, part = self._entries / name, self._parts / name
        deadline = time.monotonic() + self._patience_seconds
        while not entry.exists():
            try:
                descriptor = os.open(part, os.O_RDWR)
            except FileNotFoundError:
                self._create(entry, part, num_bytes)
                continue
            if try_lock(descriptor) and is_at(descriptor, part):
                os.ftruncate(descriptor, num_bytes)
                return descriptor
            # A large copy takes long but its file keeps changing; a chunk is written at once.
            is_progressing = is_copy and time.time() - os.fstat(descriptor).st_mtime < self._patience_seconds
            os.close(descriptor)
            if time.monotonic() > deadline and not is_progressing:
                raise OSError(errno.ETIMEDOUT, "another process of this node fetches it, but makes no progress")
            time.sleep(_PAUSE_SECONDS)
        return None

    def _create(self, entry: Path, part: Path, num_bytes: int) -> None:
        """Make room for a partial file and allocate it; the first process to lock it writes it."""
        with self._usage() as usage:
            if entry.exists() or part.exists():
                return
            used = read_number(usage)
            if used is None or used + num_bytes > self._limit_bytes:
                used = self._scan(clean_to=self._limit_bytes - num_bytes)
                write_number(usage, used)
            if used + num_bytes > self._limit_bytes:
                raise OSError(
                    errno.ENOSPC, f"no room for {counted(num_bytes, 'byte')} within `storage.cache_gigabytes`"
                )
            write_number(usage, used + num_bytes)  # First, so that a kill here only overestimates.
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            os.ftruncate(descriptor, num_bytes)
            os.close(descriptor)

    def _scan(self, clean_to: int) -> int:
        """Remove abandoned partial files and, above `clean_to` bytes, the least recently used entries.

        Returns the number of bytes of the files that are left.
        """
        remove_unlocked(list_files(self._parts))
        # Partial files first: one that is finished in between is then listed twice instead of never.
        parts, entries = list_files(self._parts), sorted(list_files(self._entries))
        sizes = {Path(path).name: size for _, size, path in parts + entries}
        total = sum(sizes.values())
        if total <= clean_to:
            return total
        surplus = total - min(clean_to, int(self._limit_bytes * _CLEAN_TO))
        return total - remove_unlocked(entries, surplus)

    def _remove_abandoned(self, usage: int) -> None:
        """Remove what killed processes left; count all files if `usage` is empty."""
        used = read_number(usage)
        freed = remove_unlocked(list_files(self._parts))
        write_number(usage, self._scan(self._limit_bytes) if used is None else used - freed)

    def _remove(self, path: Path) -> None:
        with self._usage() as usage, suppress(FileNotFoundError):
            num_bytes = path.stat().st_size
            path.unlink()
            write_number(usage, (read_number(usage) or 0) - num_bytes)

    @contextmanager
    def _usage(self) -> Iterator[int]:
        """The descriptor of the locked `usage` file."""
        descriptor = os.open(self._folder / "usage", os.O_RDWR | os.O_CREAT, 0o666)
        deadline = time.monotonic() + self._patience_seconds
        try:
            while not try_lock(descriptor):
                if time.monotonic() > deadline:
                    raise OSError(errno.ETIMEDOUT, f"another process keeps {self._folder / 'usage'} locked")
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
            log.warning("The cache %s cannot be used (%s). Remote files are read without it.", self._folder, reason)
