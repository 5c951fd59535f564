"""Bytes of local files, by positioned reads, and of URLs, by range requests through a cache on the node's disk.

A `Storage` is a value: in a forked or spawned process it opens threads and connections of its own.
"""

from __future__ import annotations

import glob
import os
import posixpath
import re
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import replace
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from voxtral_dist.config import StorageConfig
from voxtral_dist.data.stored.storage.cache import NodeCache
from voxtral_dist.data.stored.storage.cache_files import write_at
from voxtral_dist.data.stored.storage.digests import NodeDigests
from voxtral_dist.data.stored.storage.local import advise, local_error, local_path, read_local, read_regular
from voxtral_dist.data.stored.storage.prefetch import Prefetch, pool_of_process
from voxtral_dist.data.stored.storage.remote import RANGE_BYTES, Remote, RemoteFile
from voxtral_dist.data.stored.storage.spans import ShortReadError, Span, StorageError, read_error, redacted
from voxtral_dist.errors import UserError
from voxtral_dist.output.counting import counted

_MEBIBYTE = 1 << 20
_GIGABYTE = 10**9
# While waiting for another process's download: allowance per attempt for the pauses between attempts.
_PAUSE_ALLOWANCE_SECONDS = 20.0


def is_remote(location: str) -> bool:
    """Whether a location is a URL other than of a local file."""
    protocol, separator, _ = location.partition("://")
    return bool(separator) and re.fullmatch(r"[\w+.:-]+", protocol) is not None and protocol not in ("file", "local")


def join(folder: str, name: str) -> str:
    """The location of a file in a folder; a name that is a URL is returned as it is."""
    return name if is_remote(name) else posixpath.join(folder, name)


class Storage:
    """Reads spans, whole files and listings of local folders and of URLs with a protocol of fsspec."""

    def __init__(self, config: StorageConfig | None = None) -> None:
        self._config = config or StorageConfig()
        self._process: _Process | None = None

    def __reduce__(self) -> tuple[type[Storage], tuple[StorageConfig]]:
        return Storage, (self._config,)

    def read(self, span: Span) -> bytes:
        """The bytes of a span, all of them; at once if `prefetch` has read them already.

        Raises:
            StorageError: all attempts failed.
            UserError: the protocol is unknown, or its package is not installed.
        """
        return self._here.read(span) if is_remote(span.location) else read_local(span)

    def read_indexed(self, span: Span) -> bytes:
        """The bytes of an utterance that the index of a shard set lists.

        Raises:
            ShortReadError: the shard ends before; utterances before its end can be read.
            ReadError: the shard cannot be read at all, or its storage fails: no utterance is at fault.
            UserError: as of `read`.
        """
        try:
            return self.read(span)
        except ShortReadError:
            raise
        except StorageError as error:
            raise read_error(error) from error

    def prefetch(self, spans: Iterable[Span]) -> None:
        """Start to read the spans needed next; drop those of earlier calls that are not among them."""
        spans = list(spans)
        self._here.prefetch.start(span for span in spans if is_remote(span.location))
        for span in spans:
            if not is_remote(span.location):
                advise(span)

    def read_all(self, location: str, limit_bytes: int | None = None) -> bytes:
        """The bytes of a whole file.

        Raises:
            StorageError: it cannot be read, or has more bytes than the limit; `MissingFileError` if it doesn't exist.
        """
        if is_remote(location):
            return self._here.read_all(location, limit_bytes)
        try:
            path = local_path(location)
            return path.read_bytes() if limit_bytes is None else read_regular(path, limit_bytes)
        except OSError as error:
            raise local_error(location, error) from error

    def local_copy(self, location: str) -> Path:
        """The path of a local file, or of a copy of a remote one, made once per node until the remote file changes.

        Raises:
            StorageError: it cannot be fetched, or there is no room for it.
        """
        return self._here.copy(location) if is_remote(location) else local_path(location)

    def digest(self, path: Path, start: int, *, anew: bool = False) -> str:
        """The SHA-256 of a local file from a byte on, computed once per node until the file changes; see `NodeDigests`.

        Args:
            path: what `local_copy` returned.
            start: the first byte.
            anew: compute it even if this node knows it.

        Raises:
            StorageError: the file cannot be read.
        """
        folder = (self._config.cache_dir or _default_cache_dir()) / "digests"
        try:
            return NodeDigests(folder).digest(path, start, anew=anew)
        except OSError as error:
            raise local_error(str(path), error) from error

    def sizes(self, folder: str) -> dict[str, int]:
        """The sizes of the files in a folder, by name; empty over http, which has no listings.

        Raises:
            MissingFileError, NotADirectoryError: the folder doesn't exist.
            StorageError: it cannot be listed.
        """
        if is_remote(folder):
            return {} if _is_http(folder) else self._here.remote.sizes(folder)
        try:
            return {entry.name: entry.stat().st_size for entry in os.scandir(local_path(folder)) if entry.is_file()}
        except NotADirectoryError:
            raise
        except OSError as error:
            raise local_error(folder, error) from error

    def expand(self, pattern: str) -> list[str]:
        """The locations that match brace ranges and globs, sorted; a pattern without any matches itself.

        Raises:
            UserError: a glob matches nothing, or the braces are unbalanced.
        """
        try:
            names = list(braceexpand(pattern))
        except ValueError as error:
            raise UserError(
                f"The pattern {redacted(pattern)} has unbalanced braces: each `{{` needs a `}}`."
            ) from error
        found = {location for name in names for location in self._matches(name)}
        if not found:
            raise UserError(f"The pattern {redacted(pattern)} matches nothing. Correct the pattern or the path.")
        return sorted(found)

    def _matches(self, name: str) -> list[str]:
        # In a web address, a question mark starts the query.
        if not re.search(r"[*\[]" if _is_http(name) else r"[*?\[]", name):
            return [name]
        if is_remote(name):
            return self._here.remote.glob(name)
        path = str(local_path(name))
        return [name] if Path(path).exists() else glob.glob(path, recursive=True)  # noqa: PTH207 (which knows no absolute patterns)

    @property
    def _here(self) -> _Process:
        if self._process is None or self._process.process_id != os.getpid():
            self._process = _Process(self._config)
        return self._process


class _Process:
    """The connections, threads and open files of a storage in one process: none of them survives a fork."""

    def __init__(self, config: StorageConfig) -> None:
        self.process_id = os.getpid()
        self.remote = Remote(config)
        self._config = config
        self._pool = pool_of_process(config.num_reads_in_flight, self.process_id)
        self.prefetch = Prefetch(self._fetch, self._pool, int(config.prefetch_megabytes * _MEBIBYTE))
        self._files: dict[str, RemoteFile] = {}

    def read(self, span: Span) -> bytes:
        """The bytes of a span, prefetched or fetched now."""
        contents = self.prefetch.take(span)
        return self._fetch(span) if contents is None else contents

    def read_all(self, location: str, limit_bytes: int | None) -> bytes:
        """The bytes of a whole object, fetched as ranges."""
        num_bytes = self.remote.describe(location).num_bytes
        if num_bytes is None:
            return self.remote.read_whole(location)
        if limit_bytes is not None and num_bytes > limit_bytes:
            raise StorageError(
                f"{redacted(location)} cannot be read: it has {num_bytes >> 20} MiB, more than {limit_bytes >> 20}"
            )
        ranges = _ranges(num_bytes)
        return b"".join(self._in_flight([partial(self.remote.read, location, *part) for part in ranges]))

    def copy(self, location: str) -> Path:
        """The path of a whole copy in the cache."""
        file, contents = self.remote.describe(location), None
        if file.num_bytes is None:
            contents = self.remote.read_whole(location)
            file = replace(file, num_bytes=len(contents), version=sha256(contents).hexdigest())
        num_bytes = file.num_bytes or 0

        def fill(descriptor: int) -> None:
            if contents is not None:
                return write_at(descriptor, contents, 0)
            self._in_flight([partial(self._fetch_into, descriptor, location, *part) for part in _ranges(num_bytes)])
            return None

        basename = re.sub(r"[^\w.-]", "_", redacted(location).rstrip("/").rpartition("/")[2])
        return self._cache.copy(file, num_bytes, basename, fill)

    def _fetch(self, span: Span) -> bytes:
        if self._config.cache_dir is None:
            return self.remote.read(span.location, span.offset, span.num_bytes)
        file = self._describe(span.location)
        if file.num_bytes is None:
            return self.remote.read(span.location, span.offset, span.num_bytes)
        if span.offset + span.num_bytes > file.num_bytes:
            raise ShortReadError(
                f"{redacted(span.location)} cannot be read at byte {span.offset}: it has "
                f"{counted(file.num_bytes, 'byte')}, fewer than the {span.offset + span.num_bytes} that its index says"
            )
        return self._cache.read(file, span.offset, span.num_bytes, partial(self.remote.read, span.location))

    def _fetch_into(self, descriptor: int, location: str, offset: int, num_bytes: int) -> None:
        write_at(descriptor, self.remote.read(location, offset, num_bytes), offset)

    def _describe(self, location: str) -> RemoteFile:
        """Size and version of a file, requested once per process: an indexed file must not change while it is read."""
        if location not in self._files:
            self._files[location] = self.remote.describe(location)
        return self._files[location]

    def _in_flight(self, calls: list[Callable[[], Any]]) -> list[Any]:
        """The results of calls made on the pool. When one fails, wait until no call is running and raise its error."""
        futures = [self._pool.submit(call) for call in calls]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            wait([future for future in futures if not future.cancel()])
        return [future.result() for future in sorted(futures, key=lambda future: future.cancelled())]

    @cached_property
    def _cache(self) -> NodeCache:
        config = self._config
        return NodeCache(
            config.cache_dir or _default_cache_dir(),
            int(config.cache_gigabytes * _GIGABYTE),
            int(config.cache_chunk_megabytes * _MEBIBYTE),
            config.num_attempts * (config.timeout_seconds + _PAUSE_ALLOWANCE_SECONDS),
        )


def _default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "voxtral-dist"


def _ranges(num_bytes: int) -> list[tuple[int, int]]:
    return [(start, min(RANGE_BYTES, num_bytes - start)) for start in range(0, num_bytes, RANGE_BYTES)]


def _is_http(location: str) -> bool:
    return location.startswith(("http://", "https://"))
