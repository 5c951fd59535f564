"""The tar members of one utterance, from the bytes that it takes in its tar.

An utterance is a run of tar members with one key: `KEY.json`, `KEY.flac` and so on. As in WebDataset, the key ends at
the first dot of the last part of the path.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator

from voxtral_dist.output.counting import counted

TAR_BLOCK_BYTES = 512
# Names of files have at most 255 characters, numbers 20 digits.
_MOST_DIGITS = 300


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


def refuse_long_numbers(extension: bytes) -> None:
    """Refuse an extended header on which Python's tarfile would spend time quadratic in the digits of its numbers.

    Python 3.11.10 and 3.12.6 have fixed it (CVE-2024-6232); before, 1 MiB of digits takes hours.

    Raises:
        ValueError: it has a number of more than 300 digits.
    """
    if max(map(len, re.findall(rb"[0-9]+", extension)), default=0) > _MOST_DIGITS:
        raise ValueError(f"a tar header has a number of more than {_MOST_DIGITS} digits")


def _extensions(contents: bytes) -> Iterator[bytes]:
    """The contents of the extended headers of a run of members, as far as its sizes are valid."""
    offset = 0
    while offset < len(contents):
        header = contents[offset : offset + TAR_BLOCK_BYTES]
        try:
            size = max(0, tarfile.nti(header[124:136]))  # type: ignore[attr-defined]  # missing in its stubs
        except tarfile.HeaderError:
            return
        offset += TAR_BLOCK_BYTES
        if header[156:157] in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE):
            yield contents[offset : offset + size]
        offset += size + -size % TAR_BLOCK_BYTES


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
    for extension in _extensions(contents):
        refuse_long_numbers(extension)
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
