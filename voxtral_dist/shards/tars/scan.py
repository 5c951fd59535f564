"""The members of a tar, grouped by utterance, with the damage between them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

from voxtral_dist.data.stored.checks import Cause, UnusableError
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.data.stored.tar_members import split_name
from voxtral_dist.output.counting import counted
from voxtral_dist.shards.tars.files import open_tar
from voxtral_dist.shards.tars.members import Member, TarDamage, TarReader, read_members
from voxtral_dist.shards.tars.writing import tar_end

_MOST_MEMBERS = 256


@dataclass(frozen=True)
class MemberGroup:
    """The members of one utterance: neighbours with the same key.

    contents: all their bytes from `offset` on, headers included. members: their contents by suffix.
    """

    key: str
    offset: int
    contents: bytes
    members: dict[str, bytes]


class TarScan:
    """A single read of a tar: iterates over its utterances and the damage between them.

    num_bytes, sha256: of the bytes read so far; of the whole tar after the iteration.

    Raises:
        OSError: the tar cannot be read.
    """

    def __init__(self, location: str, storage: Storage) -> None:
        self._location = location
        stream, num_bytes = open_tar(location, storage)
        self._reader = TarReader(stream, num_bytes)

    def __iter__(self) -> Iterator[MemberGroup | TarDamage]:
        with closing(self._reader.stream):
            yield from _groups(self._reader, self._location)

    @property
    def num_bytes(self) -> int:
        """Number of bytes read so far."""
        return self._reader.position

    @property
    def sha256(self) -> str:
        """Hex digest of the bytes read so far."""
        return self._reader.digest.hexdigest()


def parse_span(contents: bytes) -> MemberGroup:
    """The utterance in a run of tar members.

    Raises:
        UnusableError: the bytes are not the complete members of one utterance.
    """
    ended = contents + tar_end(len(contents))
    found = list(_groups(TarReader(io.BytesIO(ended), len(ended), len(ended)), ""))
    damage = next((part for part in found if isinstance(part, TarDamage)), None)
    if damage is not None:
        raise UnusableError(Cause.DAMAGED_TAR, f"is damaged: at its byte {damage.offset} {damage.message}")
    if len(found) != 1 or not isinstance(found[0], MemberGroup) or len(found[0].contents) != len(contents):
        raise UnusableError(Cause.DAMAGED_TAR, f"must be one utterance, but its bytes hold {len(found)}")
    return found[0]


def _groups(reader: TarReader, location: str) -> Iterator[MemberGroup | TarDamage]:
    group: list[Member] = []
    for found in read_members(reader, location):
        if group and (isinstance(found, TarDamage) or not _belongs(found, group)):
            yield _group(group)
            group = []
        if isinstance(found, TarDamage):
            yield found
        elif found.name is not None:
            group.append(found)
            num_bytes = sum(len(member.raw) for member in group)
            if num_bytes > reader.largest_bytes or len(group) > _MOST_MEMBERS:
                what = f"{counted(len(group), 'member')} with {num_bytes >> 20} MiB"
                limits = f"more than {_MOST_MEMBERS} or {reader.largest_bytes >> 20} MiB"
                yield TarDamage(location, group[0].offset, num_bytes, f"an utterance has {what}, {limits}")
                group = []
    if group:
        yield _group(group)


def _belongs(found: Member, group: list[Member]) -> bool:
    """Whether a member continues a group: it is adjacent, and has the same key and a new suffix."""
    if found.name is None or found.offset != group[-1].offset + len(group[-1].raw):
        return False
    key, suffix = split_name(found.name)
    before = [split_name(str(member.name)) for member in group]
    return key == before[0][0] and suffix not in {taken for _, taken in before}


def _group(group: list[Member]) -> MemberGroup:
    key, _ = split_name(str(group[0].name))
    members = {split_name(str(member.name))[1]: member.contents for member in group}
    return MemberGroup(key, group[0].offset, b"".join(member.raw for member in group), members)
