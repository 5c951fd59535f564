"""The tar members of an utterance as bytes, and the end of a tar."""

from __future__ import annotations

import tarfile
from collections.abc import Mapping

from voxtral_dist.data.stored.tar_members import TAR_BLOCK_BYTES


def utterance_bytes(key: str, members: Mapping[str, bytes]) -> bytes:
    """The span of a sample: for each member a tar header and its contents, padded to whole blocks.

    Equal samples make equal bytes: the headers carry no time, and no owner.
    """
    return b"".join(_member_bytes(f"{key}.{suffix}", members[suffix]) for suffix in sorted(members))


def tar_end(num_bytes: int) -> bytes:
    """What ends a tar of this many bytes: two blocks of zeros, and more up to a whole record, as all writers do."""
    least = 2 * TAR_BLOCK_BYTES
    return bytes(least + -(num_bytes + least) % tarfile.RECORDSIZE)


def _member_bytes(name: str, contents: bytes) -> bytes:
    header = tarfile.TarInfo(name)
    header.size = len(contents)
    header.mode = 0o444
    # A whole number: a fraction would take an extended header of 1,024 bytes for every member.
    header.mtime = 0
    return header.tobuf(tarfile.PAX_FORMAT) + contents + bytes(padding(len(contents)))


def padding(num_bytes: int) -> int:
    """Bytes from the end of contents to the end of their last block."""
    return -num_bytes % TAR_BLOCK_BYTES
