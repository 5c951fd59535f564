"""Requests to URLs through fsspec, with timeouts, retries and errors that name what failed.

Credentials, endpoints and proxies follow each backend's own conventions. Messages contain no query strings and no
passwords, which may be secrets.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.callbacks import Callback
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

from voxtral_dist.config import StorageConfig
from voxtral_dist.data.stored.storage.spans import (
    MissingFileError,
    ShortReadError,
    StorageError,
    UnreachableError,
    redacted,
)
from voxtral_dist.errors import UserError, first_line
from voxtral_dist.output.counting import counted
from voxtral_dist.output.masking import MASK, masked

# Whole objects are fetched in ranges of this size, so that one timeout per attempt fits objects of any size.
RANGE_BYTES = 8 << 20
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 20.0
# Even errors that look permanent are retried once: proxies and shared file systems have hiccups.
_ATTEMPTS_IF_PERMANENT, _ATTEMPTS_IF_SHORT = 2, 3
# Listing a folder, page by page, takes longer than reading a range.
_LISTING_TIMEOUTS = 10
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
# Backends report progress in parts of up to 50 MB.
_STALL_TIMEOUTS = 4
# Object stores have no folders; asked for one, some make a bucket.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "hf", "http", "https", "memory"}
_STATUS_WORTH_A_RETRY = {408, 425, 429}
_PERMANENT = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    ValueError,
)
_PERMANENT_NAMES = {"NoCredentialsError", "PartialCredentialsError", "RepositoryNotFoundError", "ProfileNotFound"}
_VERSION_KEYS: tuple[str, ...] = (
    "ETag",
    "etag",
    "generation",
    "blob_id",
    "xet_hash",
    "md5Hash",
    "Content-MD5",
    "Digest",
    "sha",
)
_VERSION_KEYS += ("LastModified", "Last-Modified", "last_modified", "mtime", "created")

Result = TypeVar("Result")
# Not the global generator: augmentation seeds it, and forked workers would all pause for the same time.
_jitter = random.SystemRandom()


@dataclass(frozen=True)
class RemoteFile:
    """Size and version of an object; `num_bytes` is None and `version` empty if the server reports none."""

    location: str
    num_bytes: int | None
    version: str

    @property
    def key(self) -> str:
        """A hash that identifies the contents, as far as the server reports a version."""
        return hashlib.sha256(f"{self.location}\0{self.num_bytes}\0{self.version}".encode()).hexdigest()[:32]


class _Progress(Callback):  # type: ignore[misc]  # of a package without types
    """When a transfer made progress last."""

    def __init__(self) -> None:
        super().__init__()
        self.at = time.monotonic()

    def call(self, *arguments: Any, **named: Any) -> None:
        self.at = time.monotonic()


class Remote:
    """Requests to URLs; each process has its own connections, also after a fork."""

    def __init__(self, config: StorageConfig) -> None:
        self._config = config

    def read(self, location: str, offset: int, num_bytes: int) -> bytes:
        """Read a range of an object.

        Raises:
            StorageError: it cannot be read, or has another length.
        """
        if num_bytes == 0:
            return b""

        def attempt() -> bytes:
            contents: bytes = self._call(location, "_cat_file", start=offset, end=offset + num_bytes)
            if len(contents) > num_bytes:
                raise NotImplementedError("the server ignores the range of the request and sends the whole file")
            if len(contents) < num_bytes:
                raise ShortReadError(f"read {counted(len(contents), 'byte')} instead of {num_bytes}")
            return contents

        return self._retry(attempt, f"{redacted(location)} cannot be read at byte {offset}")

    def read_whole(self, location: str) -> bytes:
        """Read an object of unknown size in one request."""
        contents: bytes = self._retry(lambda: self._call(location, "_cat_file"), f"{redacted(location)} cannot be read")
        return contents

    def describe(self, location: str) -> RemoteFile:
        """Size and version of an object."""
        info = self._retry(lambda: self._call(location, "_info"), f"{redacted(location)} cannot be read")
        version = next((f"{key}={info[key]}" for key in _VERSION_KEYS if info.get(key)), "")
        return RemoteFile(location, info.get("size"), version)

    def folders(self, folder: str) -> list[str]:
        """Names of the folders in a folder; none where it does not exist."""
        try:
            rows = self._listed(folder)
        except MissingFileError:
            return []
        return [row["name"].rstrip("/").rsplit("/", 1)[-1] for row in rows if row["type"] == "directory"]

    def sizes(self, folder: str) -> dict[str, int]:
        """Names and sizes of the files in a folder."""
        rows = self._listed(folder)
        files = [row for row in rows if row["type"] == "file" and row["size"] is not None]
        return {row["name"].rsplit("/", 1)[-1]: row["size"] for row in files if not row["name"].endswith("/")}

    def _listed(self, folder: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self._retry(
            lambda: self._call(folder, "_ls", _LISTING_TIMEOUTS, detail=True),
            f"{redacted(folder)} cannot be listed",
        )
        return rows

    def glob(self, pattern: str) -> list[str]:
        """The locations that match a pattern."""
        names = self._retry(
            lambda: self._call(pattern, "_glob", _LISTING_TIMEOUTS), f"{redacted(pattern)} cannot be listed"
        )
        filesystem, _ = self._resolve(pattern)
        protocol = pattern.partition("://")[0]
        return [
            f"{protocol}://{filesystem._strip_protocol(name).lstrip('/')}" if "://" not in name else name
            for name in names
        ]

    def upload(self, path: Path, location: str) -> None:
        """Write a local file to a URL, in the place of what is there.

        Raises:
            StorageError: it cannot be written, or no part of it was for four timeouts.
        """
        folder, _, _ = location.rpartition("/")

        def attempt() -> None:
            if location.partition("://")[0].lower() not in _OBJECT_STORES:
                self._call(folder, "_makedirs", exist_ok=True)
            self._transfer(location, lambda filesystem, remote: (filesystem._put_file, str(path), remote))

        self._retry(attempt, f"{redacted(location)} cannot be written")

    def download(self, location: str, path: Path) -> None:
        """Write what is at a URL to a local file.

        Raises:
            StorageError: it cannot be read, or no part of it was for four timeouts.
        """
        self._retry(
            lambda: self._transfer(location, lambda filesystem, remote: (filesystem._get_file, remote, str(path))),
            f"{redacted(location)} cannot be read",
        )

    def remove(self, location: str) -> None:
        """Remove an object, if it is there.

        Raises:
            StorageError: it cannot be removed.
        """
        try:
            self._retry(lambda: self._call(location, "_rm_file"), f"{redacted(location)} cannot be removed")
        except MissingFileError:
            return

    def _transfer(self, location: str, function: Callable[[AsyncFileSystem, str], tuple[Any, str, str]]) -> None:
        """Wait for a transfer of any length as long as it makes progress."""
        filesystem, remote = self._resolve(location)
        operation, source, target = function(filesystem, remote)
        progress = _Progress()
        future = asyncio.run_coroutine_threadsafe(operation(source, target, callback=progress), filesystem.loop)
        limit = _STALL_TIMEOUTS * self._config.timeout_seconds
        while True:
            try:
                future.result(timeout=min(1.0, limit))
                return
            except TimeoutError:
                if future.done():
                    raise
                if time.monotonic() - progress.at > limit:
                    future.cancel()
                    raise

    def _resolve(self, location: str) -> tuple[AsyncFileSystem, str]:
        if f"{MASK}@" in location or f"={MASK}" in location:
            raise UserError(
                f"The location {location} was stored without its password or token: leave these out of locations, and "
                "set them where the backend looks for them, such as AWS_PROFILE or ~/.netrc (see docs/data.md)."
            )
        protocol = location.partition("://")[0].lower()
        filesystem = _filesystem(protocol, self._config.num_reads_in_flight, os.getpid())
        return filesystem, filesystem._strip_protocol(location)

    def _call(self, location: str, operation: str, num_timeouts: int = 1, **arguments: Any) -> Any:
        filesystem, path = self._resolve(location)
        timeout_seconds = self._config.timeout_seconds * num_timeouts
        return sync(filesystem.loop, getattr(filesystem, operation), path, timeout=timeout_seconds, **arguments)

    def _retry(self, attempt: Callable[[], Result], complaint: str) -> Result:
        num_failed = 0
        while True:
            try:
                return attempt()
            except UserError:
                raise
            except Exception as error:
                cause = _unhidden(error)
                num_failed += 1
                if num_failed >= min(self._config.num_attempts, _most_attempts(cause)):
                    raise self._storage_error(complaint, cause, num_failed) from cause
            longest = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2 ** (num_failed - 1))
            time.sleep(_jitter.uniform(0.0, longest))

    def _storage_error(self, complaint: str, cause: Exception, num_attempts: int) -> StorageError:
        if isinstance(cause, TimeoutError):
            reason = f"no answer within {self._config.timeout_seconds:g} s"
        else:
            reason = _reason(cause)
        return _error_type(cause)(f"{complaint}: {reason} ({counted(num_attempts, 'attempt')})")


@cache
def _filesystem(protocol: str, num_connections: int, process_id: int) -> AsyncFileSystem:
    # A forked process keeps the file systems that it inherited: closing them would remove the parent's sockets from
    # the event loop that both share.
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        remedy = f"`pip install 'voxtral-dist[{extra}]'`" if extra else first_line(error)
        raise UserError(
            f"Locations that start with `{protocol}://` need a package that is not installed: {remedy}."
        ) from error
    except ValueError as error:
        raise UserError(
            f"A location must be a path or start with s3://, gs://, https://, hf:// or another protocol of fsspec, but "
            f"starts with `{protocol}://` instead."
        ) from error
    filesystem = fsspec.filesystem(protocol, use_listings_cache=False, **_options(protocol, num_connections))
    return filesystem if filesystem.async_impl else AsyncFileSystemWrapper(filesystem, asynchronous=False)


def _options(protocol: str, num_connections: int) -> dict[str, Any]:
    configured = fsspec.config.conf.get(protocol, {})
    match protocol:
        case "http" | "https":
            client = configured.get("client_kwargs", {})
            # A compressed response has another length. trust_env: proxies from the environment, and .netrc.
            headers = {"Accept-Encoding": "identity", **client.get("headers", {})}
            return {"client_kwargs": {"trust_env": True, **client, "headers": headers}}
        case "s3" | "s3a":
            return {"config_kwargs": {"max_pool_connections": num_connections, **configured.get("config_kwargs", {})}}
    return {}


def _error_type(cause: Exception) -> type[StorageError]:
    if _is_missing(cause):
        return MissingFileError
    if isinstance(cause, ShortReadError) or _is_beyond_end(cause):
        return ShortReadError
    return StorageError if _is_permanent(cause) else UnreachableError


def _is_beyond_end(cause: Exception) -> bool:
    """Whether an object ends before the range that was asked for."""
    # s3fs hides the status in the cause of an `OSError`.
    response = getattr(cause.__cause__, "response", None)
    of_s3 = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return _status(cause) == 416 or of_s3 in ("416", "InvalidRange")


def _most_attempts(cause: Exception) -> float:
    if isinstance(cause, ShortReadError):
        return _ATTEMPTS_IF_SHORT
    return _ATTEMPTS_IF_PERMANENT if _is_permanent(cause) else float("inf")


def _is_permanent(cause: Exception) -> bool:
    status = _status(cause)
    if status is not None:
        return 400 <= status < 500 and status not in _STATUS_WORTH_A_RETRY
    return (
        isinstance(cause, _PERMANENT)
        or type(cause).__name__ in _PERMANENT_NAMES
        or (isinstance(cause, OSError) and cause.errno == errno.EINVAL)
    )


def _is_missing(cause: Exception) -> bool:
    return _status(cause) in (404, 410) or (_status(cause) is None and isinstance(cause, FileNotFoundError))


def _status(cause: Exception) -> int | None:
    """The HTTP status in an error of aiohttp, gcsfs or huggingface_hub."""
    # In this order: `code` of aiohttp's errors is deprecated.
    for holder, name in ((cause, "status"), (getattr(cause, "response", None), "status_code"), (cause, "code")):
        status = getattr(holder, name, None)
        if isinstance(status, int) and status >= 300:
            return status
    return None


def _unhidden(error: Exception) -> Exception:
    """The true cause of an error: fsspec's HTTP reports a missing file whenever it cannot get the size."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, Exception):
        return error
    return cause if isinstance(cause, TimeoutError) or type(cause).__module__.startswith("aiohttp") else error


def _reason(cause: Exception) -> str:
    status = _status(cause)
    if _is_missing(cause):
        return "no such file"
    if status is not None:
        return f"the server responds with status {status}"
    if isinstance(cause, PermissionError):
        return f"access is denied ({first_line(cause)})"
    return masked(re.sub(r"\?[^\s'\")]*", "", first_line(cause))) or type(cause).__name__
