"""Tar shards as runs of bytes: the members of a sample written as a span, and every span of a tar found again.

Python's tarfile ends at a garbled header without an error. The reader here says where a tar is damaged, and goes on at
the next whole header.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import BinaryIO, cast

from braceexpand import braceexpand

from voxtral_dist.data.causes import Cause, UnusableError
from voxtral_dist.data.members import TAR_BLOCK_BYTES, split_name
from voxtral_dist.data.storage import Span, Storage, is_remote, join
from voxtral_dist.errors import UserError, first_line

COMPRESSED_SUFFIXES = (".tar.gz", ".tgz")
# As webdataset writes what a shell command prints: `pipe:aws s3 cp s3://bucket/x.tar -`.
PIPE_PREFIX = "pipe:"
_ZEROS = bytes(TAR_BLOCK_BYTES)
# Extended headers stand before the header that they extend.
_EXTENDING_TYPES = frozenset(
    {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
)
# Where the length of a tar is not known, a member that claims more than this is taken for damage.
_LARGEST_MEMBER_BYTES = 2**32
_REMOTE_BLOCK_BYTES = 4 * 2**20
# The one that is read, and those that are under way meanwhile.
_NUM_REMOTE_BLOCKS = 4
# As webdataset skips them: notes of a tool about the tar, not samples.
_META_NAME = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True)
class TarSample:
    """Neighbouring members of one key: their contents by suffix, and all bytes from the first header on."""

    key: str
    offset: int
    contents: bytes
    members: dict[str, bytes]


@dataclass(frozen=True)
class TarDamage:
    """Bytes of a tar that are no members: where they begin, how many are lost, and what is wrong."""

    location: str
    offset: int
    num_bytes: int
    message: str

    def __str__(self) -> str:
        lost = f"{self.num_bytes} bytes are lost" if self.num_bytes else "no bytes are lost"
        return f"at byte {self.offset} {self.message}; {lost}"


@dataclass(frozen=True)
class _Member:
    name: str | None
    offset: int
    raw: bytes
    contents: bytes


class _DamagedError(Exception):
    """Here no member begins."""


def sample_bytes(key: str, members: Mapping[str, bytes]) -> bytes:
    """The span of a sample: for each member a tar header and its contents, padded to whole blocks.

    Equal samples make equal bytes: the headers carry no time, and no owner.
    """
    return b"".join(_member_bytes(f"{key}.{suffix}", members[suffix]) for suffix in sorted(members))


def tar_end(num_bytes: int) -> bytes:
    """What ends a tar of this many bytes: two blocks of zeros, and more up to a whole record, as all writers do."""
    padding = 2 * TAR_BLOCK_BYTES
    return bytes(padding + -(num_bytes + padding) % tarfile.RECORDSIZE)


def tar_locations(pattern: str, storage: Storage) -> list[str]:
    """The tars in a folder, or that a glob or brace range stands for, in the order of their names.

    Raises:
        UserError: there are none.
    """
    if pattern.startswith(PIPE_PREFIX):
        return list(braceexpand(pattern))
    try:
        found = [pattern] if is_tar_pattern(pattern) else [join(pattern, name) for name in storage.sizes(pattern)]
        locations = [tar for name in found if is_tar_pattern(name) for tar in storage.expand(name)]
    except OSError as error:
        raise UserError(f"The tars {pattern} cannot be listed: {error.strerror or first_line(error)}.") from error
    if not locations:
        raise UserError(f"There are no tars in {pattern}: give a folder with tars, a glob or a brace range of them.")
    return sorted(locations)


def is_tar_pattern(name: str) -> bool:
    """Whether a name is that of tars."""
    return name.startswith(PIPE_PREFIX) or name.endswith((".tar", *COMPRESSED_SUFFIXES))


class TarScan:
    """One pass over a tar: iterating gives its samples in their order, and the damage between them.

    num_bytes, sha256: of all that was read; of the whole tar when the iteration is over.

    Raises:
        OSError: the tar cannot be read.
    """

    def __init__(self, location: str, storage: Storage) -> None:
        self._location = location
        stream, num_bytes = open_tar(location, storage)
        self._reader = _Reader(stream, num_bytes)

    def __iter__(self) -> Iterator[TarSample | TarDamage]:
        with closing(self._reader.stream):
            yield from _samples(self._reader, self._location)

    @property
    def num_bytes(self) -> int:
        """Read so far."""
        return self._reader.position

    @property
    def sha256(self) -> str:
        """Of these bytes."""
        return self._reader.digest.hexdigest()


def parse_span(contents: bytes) -> TarSample:
    """The sample whose tar members these bytes are.

    Raises:
        UnusableError: they are not whole members of one sample.
    """
    ended = contents + tar_end(len(contents))
    found = list(_samples(_Reader(io.BytesIO(ended), len(ended)), ""))
    damage = next((part for part in found if isinstance(part, TarDamage)), None)
    if damage is not None:
        raise UnusableError(Cause.DAMAGED_TAR, f"is damaged: at byte {damage.offset} of it {damage.message}")
    if len(found) != 1 or not isinstance(found[0], TarSample) or len(found[0].contents) != len(contents):
        raise UnusableError(Cause.DAMAGED_TAR, f"must be the members of one sample, but {len(found)} samples are there")
    return found[0]


def open_tar(location: str, storage: Storage) -> tuple[BinaryIO, int | None]:
    """A tar as a stream of bytes, and how many they are; None for compressed ones and pipes, which tell at their end.

    Raises:
        OSError: it cannot be read.
    """
    if location.startswith(PIPE_PREFIX):
        return _open_pipe(location), None
    if not is_remote(location):
        path = storage.local_copy(location)
        stream, num_bytes = path.open("rb"), path.stat().st_size
        return _plain(stream, location, num_bytes)
    folder, _, name = location.rpartition("/")
    listed = storage.sizes(folder).get(name)
    if listed is None:
        # A web server tells no lengths of files in a folder.
        copy = storage.local_copy(location)
        return _plain(copy.open("rb"), location, copy.stat().st_size)
    remote = io.BufferedReader(_RemoteFile(location, listed, storage))
    return _plain(cast(BinaryIO, remote), location, listed)


def _open_pipe(location: str) -> BinaryIO:
    # Imported here, because it takes seconds.
    from webdataset import gopen

    opened: BinaryIO = gopen(location)
    return opened


def _plain(stream: BinaryIO, location: str, num_bytes: int) -> tuple[BinaryIO, int | None]:
    if location.endswith(COMPRESSED_SUFFIXES):
        return cast(BinaryIO, gzip.GzipFile(fileobj=stream)), None
    return stream, num_bytes


class _RemoteFile(io.RawIOBase):
    """A file elsewhere, read block after block, some of them ahead."""

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


def _member_bytes(name: str, contents: bytes) -> bytes:
    header = tarfile.TarInfo(name)
    header.size = len(contents)
    header.mode = 0o444
    # A whole number: a fraction would take an extended header of 1,024 bytes for every member.
    header.mtime = 0
    return header.tobuf(tarfile.PAX_FORMAT) + contents + bytes(_padding(len(contents)))


def _padding(num_bytes: int) -> int:
    return -num_bytes % TAR_BLOCK_BYTES


def _belongs(found: _Member, group: list[_Member]) -> bool:
    """Whether a member goes on with the sample: the same key, next to it, and no second one of a suffix."""
    if found.name is None or found.offset != group[-1].offset + len(group[-1].raw):
        return False
    key, suffix = split_name(found.name)
    before = [split_name(str(member.name)) for member in group]
    return key == before[0][0] and suffix not in {taken for _, taken in before}


def _sample(group: list[_Member]) -> TarSample:
    key, _ = split_name(str(group[0].name))
    members = {split_name(str(member.name))[1]: member.contents for member in group}
    return TarSample(key, group[0].offset, b"".join(member.raw for member in group), members)


class _Reader:
    """The bytes of a tar one after the other, counted and digested."""

    def __init__(self, stream: BinaryIO, num_bytes: int | None) -> None:
        self.stream = stream
        self.digest = hashlib.sha256()
        self.position = 0
        self._num_bytes = num_bytes

    @property
    def left(self) -> int:
        """Bytes that may follow."""
        return _LARGEST_MEMBER_BYTES if self._num_bytes is None else self._num_bytes - self.position

    def read(self, num_bytes: int) -> bytes:
        """These bytes, or less at the end of the tar."""
        try:
            contents = self.stream.read(num_bytes)
        except (EOFError, gzip.BadGzipFile, zlib.error):
            # Cut off or garbled: what cannot be unpacked is not there.
            contents = b""
        self.position += len(contents)
        self.digest.update(contents)
        return contents


def _samples(reader: _Reader, location: str) -> Iterator[TarSample | TarDamage]:
    group: list[_Member] = []
    for found in _members(reader, location):
        if group and (isinstance(found, TarDamage) or not _belongs(found, group)):
            yield _sample(group)
            group = []
        if isinstance(found, TarDamage):
            yield found
        elif found.name is not None:
            group.append(found)
    if group:
        yield _sample(group)


def _members(reader: _Reader, location: str) -> Iterator[_Member | TarDamage]:
    """All members of a tar and the damage between them; the name is None where a member belongs to no sample."""
    block = reader.read(TAR_BLOCK_BYTES)
    while True:
        start = reader.position - len(block)
        if block == _ZEROS:
            block = _next_header(reader)
            if not block:
                return
            offset = reader.position - len(block)
            yield TarDamage(location, offset, 0, "it goes on behind the mark of its end, where most readers stop")
            continue
        try:
            member = _read_member(reader, block, start)
        except _DamagedError as error:
            block = _next_header(reader)
            yield TarDamage(location, start, reader.position - len(block) - start, str(error))
            if not block:
                return
            continue
        yield member
        block = reader.read(TAR_BLOCK_BYTES)


def _read_member(reader: _Reader, block: bytes, offset: int) -> _Member:
    """The member whose first block is this."""
    raw, extended = b"", False
    while True:
        header = _header(block)
        has_contents = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES or header.type in _EXTENDING_TYPES
        size = header.size if has_contents else 0
        contents = _read_contents(reader, header.name, size)
        raw += block + contents
        if header.type not in _EXTENDING_TYPES:
            return _Member(_name(header, raw, extended), offset, raw, contents[:size])
        block, extended = reader.read(TAR_BLOCK_BYTES), True


def _header(block: bytes) -> tarfile.TarInfo:
    if not block:
        raise _DamagedError("it ends without the mark of its end, so it may be cut off")
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        what = "its header is cut off" if len(block) < TAR_BLOCK_BYTES else f"its header is garbled ({error})"
        raise _DamagedError(what) from error


def _read_contents(reader: _Reader, name: str, size: int) -> bytes:
    padded = size + _padding(size)
    left = reader.left
    if size < 0 or padded > left:
        raise _DamagedError(f"the member {name} claims {size} bytes, but only {left} follow")
    contents = reader.read(padded)
    if len(contents) < padded:
        raise _DamagedError(f"the member {name} claims {size} bytes, but only {len(contents)} follow")
    return contents


def _next_header(reader: _Reader) -> bytes:
    """The next block that is surely a header; nothing at the end of the tar."""
    while block := reader.read(TAR_BLOCK_BYTES):
        if block[257:262] == b"ustar" and _is_header(block):
            return block
    return b""


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _name(header: tarfile.TarInfo, raw: bytes, extended: bool) -> str | None:
    """The full name of a member that belongs to a sample."""
    name = header.name
    if extended:
        with tarfile.open(fileobj=io.BytesIO(raw + 2 * _ZEROS), mode="r:") as tar:
            name = tar.getnames()[0]
    key, suffix = split_name(name)
    belongs = header.isreg() and suffix and not key.endswith("/") and key and not _META_NAME.match(name)
    return name if belongs else None
