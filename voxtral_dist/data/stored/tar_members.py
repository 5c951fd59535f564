"""The tar members of one utterance, from the bytes that it takes in its tar.

An utterance is a run of tar members with one key: `KEY.json`, `KEY.flac` and so on. As in WebDataset, the key ends at
the first dot of the last part of the path.
"""

from __future__ import annotations

import io
import tarfile

from voxtral_dist.output.counting import counted

TAR_BLOCK_BYTES = 512


def read_members(contents: bytes) -> tuple[str, dict[str, bytes]]:
    """The key of a run of tar members, and their contents by suffix.

    Raises:
        tarfile.TarError, ValueError: the bytes are not tar members.
    """
    return _plain_members(contents) or _any_members(contents)


def split_name(name: str) -> tuple[str, str]:
    """The key and the suffix of a member: `a/b.c/1.en.json` -> (`a/b.c/1`, `en.json`)."""
    folder, slash, last = name.rpartition("/")
    stem, _, suffix = last.partition(".")
    return folder + slash + stem, suffix.lower()


def _plain_members(contents: bytes) -> tuple[str, dict[str, bytes]] | None:
    """`_any_members` in a tenth of the time for plain headers; None if there are others, as for long names."""
    members: dict[str, bytes] = {}
    key, offset = "", 0
    while offset < len(contents):
        header = contents[offset : offset + TAR_BLOCK_BYTES]
        offset += TAR_BLOCK_BYTES
        if header[156:157] != tarfile.REGTYPE or header[257:263] != b"ustar\0" or header[124] >= 0x80:
            return None
        size = int(header[124:136].rstrip(b"\0 "), 8)
        if size < 0:
            raise ValueError(f"a tar header claims {counted(size, 'byte')}")
        prefix, name = header[345:500].rstrip(b"\0"), header[:100].rstrip(b"\0")
        key, suffix = split_name((prefix + b"/" + name if prefix else name).decode("utf-8"))
        members[suffix] = contents[offset : offset + size]
        offset += size + -size % TAR_BLOCK_BYTES
    return key, members


def _any_members(contents: bytes) -> tuple[str, dict[str, bytes]]:
    members: dict[str, bytes] = {}
    key = ""
    with tarfile.open(fileobj=io.BytesIO(contents + bytes(2 * TAR_BLOCK_BYTES)), mode="r:") as tar:
        for member in tar:
            # A sparse member may claim any size; behind a negative one, tarfile begins anew.
            if not 0 <= member.size <= len(contents):
                raise ValueError(f"a tar header claims {counted(member.size, 'byte')}")
            extracted = tar.extractfile(member)
            if extracted is not None:
                key, suffix = split_name(member.name)
                members[suffix] = extracted.read()
    return key, members
