"""Tars found by patterns, and opened as streams of bytes: local, remote, compressed or from a pipe."""

from __future__ import annotations

import gzip
import io
from typing import BinaryIO, cast

from braceexpand import braceexpand

from voxtral_dist.data.stored.placeholders import HEAD_BYTES, placeholder_reason
from voxtral_dist.data.stored.storage import Span, Storage, is_remote, join, open_regular
from voxtral_dist.errors import UserError, first_line

COMPRESSED_SUFFIXES = (".tar.gz", ".tgz")
# WebDataset's notation for the output of a shell command: `pipe:aws s3 cp s3://bucket/x.tar -`.
PIPE_PREFIX = "pipe:"
_REMOTE_BLOCK_BYTES = 4 * 2**20
# The block that is read, and those that are fetched meanwhile.
_NUM_REMOTE_BLOCKS = 4


def tar_locations(pattern: str, storage: Storage) -> list[str]:
    """The tars in a folder, or of a glob or brace range, sorted by name.

    Raises:
        UserError: there are none, or they cannot be listed.
    """
    if pattern.startswith(PIPE_PREFIX):
        return list(braceexpand(pattern))
    try:
        found = [pattern] if is_tar_pattern(pattern) else _shown(pattern, storage)
        locations = [tar for name in found if is_tar_pattern(name) for tar in storage.expand(name)]
    except OSError as error:
        raise UserError(f"The tars {pattern} cannot be listed: {error.strerror or first_line(error)}.") from error
    if not locations:
        raise UserError(f"There are no tars in {pattern}: give a folder with tars, a glob or a brace range of them.")
    return sorted(locations)


def _shown(folder: str, storage: Storage) -> list[str]:
    """The files of a folder that are not hidden."""
    return [join(folder, name) for name in storage.sizes(folder) if not name.startswith(".")]


def is_tar_pattern(name: str) -> bool:
    """Whether a name or pattern means tars."""
    return name.startswith(PIPE_PREFIX) or name.endswith((".tar", *COMPRESSED_SUFFIXES))


def open_tar(location: str, storage: Storage) -> tuple[BinaryIO, int | None]:
    """Open a tar as a stream of bytes, with their number; None for compressed tars and pipes, which do not know it.

    Raises:
        OSError: the tar cannot be read.
    """
    if location.startswith(PIPE_PREFIX):
        return _open_pipe(location), None
    if not is_remote(location):
        path = storage.local_copy(location)
        stream = open_regular(path)
        if (reason := placeholder_reason(stream.read(HEAD_BYTES))) is not None:
            stream.close()
            raise UserError(f"The tar {location} {reason}.")
        stream.seek(0)
        return _plain(stream, location, path.stat().st_size)
    folder, _, name = location.rpartition("/")
    listed = storage.sizes(folder).get(name)
    if listed is None:
        # Web servers do not list the sizes of files.
        copy = storage.local_copy(location)
        return _plain(copy.open("rb"), location, copy.stat().st_size)
    remote = io.BufferedReader(_RemoteFile(location, listed, storage))
    return _plain(cast(BinaryIO, remote), location, listed)


def _open_pipe(location: str) -> BinaryIO:
    # This import takes seconds.
    from webdataset import gopen

    opened: BinaryIO = gopen(location)
    return opened


def _plain(stream: BinaryIO, location: str, num_bytes: int) -> tuple[BinaryIO, int | None]:
    if location.endswith(COMPRESSED_SUFFIXES):
        return cast(BinaryIO, gzip.GzipFile(fileobj=stream)), None
    return stream, num_bytes


class _RemoteFile(io.RawIOBase):
    """A remote file, read in blocks, some of them ahead."""

    def __init__(self, location: str, num_bytes: int, storage: Storage) -> None:
        self._location = location
        self._num_bytes = num_bytes
        self._storage = storage
        self._next_offset = 0
        self._block = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        if not self._block and self._next_offset < self._num_bytes:
            self._read_block()
        taken = self._block[: len(buffer)]
        buffer[: len(taken)] = taken
        self._block = self._block[len(taken) :]
        return len(taken)

    def _read_block(self) -> None:
        starts = range(self._next_offset, self._num_bytes, _REMOTE_BLOCK_BYTES)[:_NUM_REMOTE_BLOCKS]
        blocks = [Span(self._location, at, min(_REMOTE_BLOCK_BYTES, self._num_bytes - at)) for at in starts]
        self._storage.prefetch(blocks)
        self._block = memoryview(self._storage.read(blocks[0]))
        self._next_offset += len(self._block)
