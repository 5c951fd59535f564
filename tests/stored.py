"""What tests read back from packed or indexed tars."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxtral_dist.data.stored.audio import decode_audio, to_pcm
from voxtral_dist.data.stored.index import ShardIndex, read_index
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.data.stored.utterance import StoredUtterance, utterance_of
from voxtral_dist.shards.tars import MemberGroup, parse_span


@dataclass(frozen=True)
class Stored:
    """A sample of a set, as far as it does not depend on where it came from."""

    key: str
    text: str
    language: str | None
    pcm: bytes


def tar_samples(index: ShardIndex) -> list[MemberGroup]:
    storage = Storage()
    return [parse_span(storage.read(index.span(utterance_id))) for utterance_id in range(len(index))]


def utterances_in(folder: Path) -> list[StoredUtterance]:
    index = read_index([str(folder)])
    return [utterance_of(one.key, one.members, index.layout(number)) for number, one in enumerate(tar_samples(index))]


def stored_in(folder: Path) -> list[Stored]:
    """All samples of a set; the language is that of the index."""
    index = read_index([str(folder)])
    return [
        Stored(one.key, one.text, index.language(number), to_pcm(decode_audio(one.audio, 16_000)).tobytes())
        for number, one in enumerate(utterances_in(folder))
    ]


def contents_of(folder: Path) -> dict[str, Any]:
    """All files of a folder, byte for byte."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
