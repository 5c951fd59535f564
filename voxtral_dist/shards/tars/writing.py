"""The bytes of a tar: the members of an utterance, and the end mark."""

from __future__ import annotations

import tarfile
from collections.abc import Mapping

from voxtral_dist.data.stored.tar_members import TAR_BLOCK_BYTES


def utterance_bytes(key: str, members: Mapping[str, bytes]) -> bytes:
    """The members of an utterance as bytes: for each a tar header and its contents, padded to whole blocks.

    Equal utterances give equal bytes: headers have neither time nor owner.
    """
    return b"".join(_member_bytes(f"{key}.{suffix}", members[suffix]) for suffix in sorted(members))


def tar_end(num_bytes: int) -> bytes:
    """The end mark of a tar with `num_bytes`: two blocks of zeros, padded to a whole record as by all writers."""
    least = 2 * TAR_BLOCK_BYTES
    return bytes(least + -(num_bytes + least) % tarfile.RECORDSIZE)


def _member_bytes(name: str, contents: bytes) -> bytes:
    header = tarfile.TarInfo(name)
    header.size = len(contents)
    header.mode = 0o444
    # An integer: a fraction takes an extended header of 1,024 bytes per member.
    header.mtime = 0
    return header.tobuf(tarfile.PAX_FORMAT) + contents + bytes(padding(len(contents)))


def padding(num_bytes: int) -> int:
    """Number of bytes that pad contents to whole blocks."""
    return -num_bytes % TAR_BLOCK_BYTES
