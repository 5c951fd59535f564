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
from typing import BinaryIO

from voxtral_dist.data.stored.checks import Cause, UnusableError
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.data.stored.tar_members import TAR_BLOCK_BYTES, split_name
from voxtral_dist.shards.tar_files import open_tar

_ZEROS = bytes(TAR_BLOCK_BYTES)
# Extended headers stand before the header that they extend.
_EXTENDING_TYPES = frozenset(
    {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
)
# Where the length of a tar is not known, a member that claims more than this is taken for damage.
_LARGEST_MEMBER_BYTES = 2**32
# As webdataset skips them: notes of a tool about the tar, not samples.
_META_NAME = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True)
class MemberGroup:
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

    def __iter__(self) -> Iterator[MemberGroup | TarDamage]:
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


def parse_span(contents: bytes) -> MemberGroup:
    """The sample whose tar members these bytes are.

    Raises:
        UnusableError: they are not whole members of one sample.
    """
    ended = contents + tar_end(len(contents))
    found = list(_samples(_Reader(io.BytesIO(ended), len(ended)), ""))
    damage = next((part for part in found if isinstance(part, TarDamage)), None)
    if damage is not None:
        raise UnusableError(Cause.DAMAGED_TAR, f"is damaged: at byte {damage.offset} of it {damage.message}")
    if len(found) != 1 or not isinstance(found[0], MemberGroup) or len(found[0].contents) != len(contents):
        raise UnusableError(Cause.DAMAGED_TAR, f"must be the members of one sample, but {len(found)} samples are there")
    return found[0]


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


def _sample(group: list[_Member]) -> MemberGroup:
    key, _ = split_name(str(group[0].name))
    members = {split_name(str(member.name))[1]: member.contents for member in group}
    return MemberGroup(key, group[0].offset, b"".join(member.raw for member in group), members)


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


def _samples(reader: _Reader, location: str) -> Iterator[MemberGroup | TarDamage]:
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
