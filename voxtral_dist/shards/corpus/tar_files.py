"""The files of a tar one by one, for corpora whose names do not group them as WebDataset does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

from voxtral_dist.data.stored.checks import Cause
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.errors import UserError
from voxtral_dist.shards.corpus.utterances import Refusal
from voxtral_dist.shards.tars.files import open_tar
from voxtral_dist.shards.tars.members import TarDamage, TarReader, read_members


@dataclass(frozen=True)
class TarFile:
    """A file in a tar. place: of the tar and the offset, for messages."""

    name: str
    contents: bytes
    place: str


def tar_files(location: str) -> Iterator[TarFile | Refusal]:
    """The files of a tar that are not hidden, and refusals of what is damaged.

    Raises:
        UserError: the tar cannot be read.
    """
    try:
        stream, num_bytes = open_tar(location, Storage())
        with closing(stream):
            for found in read_members(TarReader(stream, num_bytes), location):
                if isinstance(found, TarDamage):
                    yield Refusal(location, "", Cause.DAMAGED_TAR, str(found))
                elif found.name is not None:
                    yield TarFile(found.name.removeprefix("./"), found.contents, f"{location}:{found.offset}")
    except OSError as error:
        raise UserError(f"The tar {location} cannot be read: {error.strerror or error}.") from error
