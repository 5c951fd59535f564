"""The members of a tar, read past damage.

Python's tarfile ends at a garbled header without an error. This reader reports the damage, and continues at the next
valid header.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from voxtral_dist.data.stored.tar_members import TAR_BLOCK_BYTES, split_name
from voxtral_dist.shards.tars.writing import padding

_ZEROS = bytes(TAR_BLOCK_BYTES)
# Extended headers precede the header that they extend.
_EXTENDING_TYPES = frozenset(
    {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
)
# If the size of a tar is unknown, a member that claims more than this counts as damage.
_LARGEST_MEMBER_BYTES = 2**32
# Metadata of tools, which WebDataset skips too.
_META_NAME = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True)
class TarDamage:
    """Damage in a tar: the offset of the first byte, the number of lost bytes, and what is wrong."""

    location: str
    offset: int
    num_bytes: int
    message: str

    def __str__(self) -> str:
        lost = f"{self.num_bytes} bytes are lost" if self.num_bytes else "no bytes are lost"
        return f"at byte {self.offset} {self.message}; {lost}"


@dataclass(frozen=True)
class Member:
    """One member of a tar.

    name: None if it belongs to no utterance. raw: headers and contents, padded to whole blocks.
    """

    name: str | None
    offset: int
    raw: bytes
    contents: bytes


class _DamagedError(Exception):
    """No valid member begins here."""


class TarReader:
    """The stream of a tar, which counts and hashes the bytes that it reads."""

    def __init__(self, stream: BinaryIO, num_bytes: int | None) -> None:
        self.stream = stream
        self.digest = hashlib.sha256()
        self.position = 0
        self._num_bytes = num_bytes

    @property
    def left(self) -> int:
        """Number of bytes that may follow."""
        return _LARGEST_MEMBER_BYTES if self._num_bytes is None else self._num_bytes - self.position

    def read(self, num_bytes: int) -> bytes:
        """The next bytes; fewer at the end of the tar."""
        try:
            contents = self.stream.read(num_bytes)
        except (EOFError, gzip.BadGzipFile, zlib.error):
            # What cannot be decompressed counts as missing.
            contents = b""
        self.position += len(contents)
        self.digest.update(contents)
        return contents


def read_members(reader: TarReader, location: str) -> Iterator[Member | TarDamage]:
    """All members of a tar, and the damage between them."""
    block = reader.read(TAR_BLOCK_BYTES)
    while True:
        start = reader.position - len(block)
        if block == _ZEROS:
            block = _next_header(reader)
            if not block:
                return
            offset = reader.position - len(block)
            yield TarDamage(location, offset, 0, "it continues after its end mark, where most readers stop")
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


def _read_member(reader: TarReader, block: bytes, offset: int) -> Member:
    """The member that begins with `block`."""
    raw, extended = b"", False
    while True:
        header = _header(block)
        has_contents = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES or header.type in _EXTENDING_TYPES
        size = header.size if has_contents else 0
        contents = _read_contents(reader, header.name, size)
        raw += block + contents
        if header.type not in _EXTENDING_TYPES:
            return Member(_name(header, raw, extended), offset, raw, contents[:size])
        block, extended = reader.read(TAR_BLOCK_BYTES), True


def _header(block: bytes) -> tarfile.TarInfo:
    if not block:
        raise _DamagedError("it has no end mark, so it may be truncated")
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        what = "its header is truncated" if len(block) < TAR_BLOCK_BYTES else f"its header is garbled ({error})"
        raise _DamagedError(what) from error


def _read_contents(reader: TarReader, name: str, size: int) -> bytes:
    padded = size + padding(size)
    left = reader.left
    if size < 0 or padded > left:
        raise _DamagedError(f"the member {name} claims {size} bytes, but only {left} follow")
    contents = reader.read(padded)
    if len(contents) < padded:
        raise _DamagedError(f"the member {name} claims {size} bytes, but only {len(contents)} follow")
    return contents


def _next_header(reader: TarReader) -> bytes:
    """The next block that is a valid header; empty at the end of the tar."""
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
    """The full name of a member; None if it belongs to no utterance."""
    name = header.name
    if extended:
        with tarfile.open(fileobj=io.BytesIO(raw + 2 * _ZEROS), mode="r:") as tar:
            name = tar.getnames()[0]
    key, suffix = split_name(name)
    belongs = header.isreg() and suffix and not key.endswith("/") and key and not _META_NAME.match(name)
    return name if belongs else None
