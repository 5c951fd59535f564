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

from voxtral_dist.data.stored.tar_members import TAR_BLOCK_BYTES, refuse_long_numbers, split_name
from voxtral_dist.output.counting import counted
from voxtral_dist.shards.tars.writing import padding

_ZEROS = bytes(TAR_BLOCK_BYTES)
# Extended headers precede the header that they extend.
_EXTENDING_TYPES = frozenset(
    {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
)
# Members of an utterance together: half an hour of 24-bit stereo at 48 kHz.
LARGEST_UTTERANCE_BYTES = 2**29
# Extended headers of a member together: names have at most some thousand characters.
_LARGEST_EXTENSION_BYTES = 2**20
# If the size of a tar is unknown, a member that claims more than this counts as damage.
_LARGEST_CLAIM_BYTES = 2**40
_SKIPPED_AT_A_TIME = 2**20
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
        lost = f"{counted(self.num_bytes, 'byte')} lost" if self.num_bytes else "no bytes lost"
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


class _UnusableMemberError(Exception):
    """A member was read to its end, but cannot be used."""


class TarReader:
    """The stream of a tar, which counts and hashes the bytes that it reads. Larger members are skipped."""

    def __init__(self, stream: BinaryIO, num_bytes: int | None, largest_bytes: int = LARGEST_UTTERANCE_BYTES) -> None:
        self.stream = stream
        self.largest_bytes = largest_bytes
        self.digest = hashlib.sha256()
        self.position = 0
        self._num_bytes = num_bytes

    @property
    def left(self) -> int:
        """Number of bytes that may follow."""
        return _LARGEST_CLAIM_BYTES if self._num_bytes is None else self._num_bytes - self.position

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

    def skip(self, num_bytes: int) -> None:
        """Read bytes without keeping them."""
        end = self.position + num_bytes
        while self.position < end and self.read(min(_SKIPPED_AT_A_TIME, end - self.position)):
            pass


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
        except _UnusableMemberError as error:
            yield TarDamage(location, start, reader.position - start, str(error))
            block = reader.read(TAR_BLOCK_BYTES)
            continue
        yield member
        block = reader.read(TAR_BLOCK_BYTES)


def _read_member(reader: TarReader, block: bytes, offset: int) -> Member:
    """The member that begins with `block`."""
    extension = b""
    while True:
        header = _header(block)
        is_extension = header.type in _EXTENDING_TYPES
        has_contents = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES or is_extension
        size = header.size if has_contents else 0
        limit = _LARGEST_EXTENSION_BYTES - len(extension) if is_extension else reader.largest_bytes
        contents = _read_contents(reader, header.name, size, limit)
        if not is_extension:
            name = _name(header, extension + block if extension else b"")
            return Member(name, offset, b"".join((extension, block, contents)), contents[:size])
        try:
            refuse_long_numbers(contents)
        except ValueError as error:
            raise _UnusableMemberError(str(error)) from error
        extension += block + contents
        block = reader.read(TAR_BLOCK_BYTES)


def _header(block: bytes) -> tarfile.TarInfo:
    if not block:
        raise _DamagedError("it has no end mark, so it may be truncated")
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        what = "its header is truncated" if len(block) < TAR_BLOCK_BYTES else f"its header is garbled ({error})"
        raise _DamagedError(what) from error


def _read_contents(reader: TarReader, name: str, size: int, limit_bytes: int) -> bytes:
    padded = size + padding(size)
    left = reader.left
    if size < 0 or padded > left:
        raise _DamagedError(f"the member {name} claims {counted(size, 'byte')}, but only {left} follow")
    if padded > limit_bytes:
        reader.skip(padded)
        raise _UnusableMemberError(f"the member {name} has {size >> 20} MiB, more than {max(limit_bytes, 0) >> 20}")
    contents = reader.read(padded)
    if len(contents) < padded:
        raise _DamagedError(f"the member {name} claims {counted(size, 'byte')}, but only {len(contents)} follow")
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


def _name(header: tarfile.TarInfo, extended: bytes) -> str | None:
    """The full name of a member, from its extended headers if it has any; None if it belongs to no utterance."""
    name = header.name
    if extended:
        try:
            with tarfile.open(fileobj=io.BytesIO(extended + 2 * _ZEROS), mode="r:") as tar:
                first = tar.next()
                name = "" if first is None else first.name
        except Exception as error:
            # Extended headers hold numbers and lists that tarfile trusts.
            raise _UnusableMemberError(f"the extended header of the member {name} is garbled") from error
    key, suffix = split_name(name)
    belongs = header.isreg() and suffix and not key.endswith("/") and key and not _META_NAME.match(name)
    return name if belongs else None
