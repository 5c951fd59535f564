"""Helpers that read back packed or indexed tars."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from voxtral_dist.data.stored.audio import decode_audio, to_pcm
from voxtral_dist.data.stored.index import ShardIndex, read_index
from voxtral_dist.data.stored.index_files import INDEX_FILE, SHARD_TABLE_FILE
from voxtral_dist.data.stored.shard_set import Records
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.data.stored.utterance import StoredUtterance, utterance_of
from voxtral_dist.shards.packing import PackProgress
from voxtral_dist.shards.tars.scan import MemberGroup, parse_span
from voxtral_dist.text.json_text import json_checksum


@dataclass(frozen=True)
class DecodedUtterance:
    """The parts of an utterance that don't depend on the source it was packed from."""

    key: str
    text: str
    language: str | None
    pcm: bytes


def member_groups(index: ShardIndex) -> list[MemberGroup]:
    storage = Storage()
    return [parse_span(storage.read(index.span(utterance_id))) for utterance_id in range(len(index))]


def utterances_in(folder: Path) -> list[StoredUtterance]:
    index = read_index([str(folder)])
    return [utterance_of(one.key, one.members, index.layout(number)) for number, one in enumerate(member_groups(index))]


def decoded_in(folder: Path) -> list[DecodedUtterance]:
    """All utterances of a set, with the languages of the index."""
    index = read_index([str(folder)])
    return [
        DecodedUtterance(one.key, one.text, index.language(number), to_pcm(decode_audio(one.audio, 16_000)).tobytes())
        for number, one in enumerate(utterances_in(folder))
    ]


def write_records(folder: Path, records: Records) -> None:
    """Replace the records of an index and their checksum, as if the set had been indexed so."""
    np.save(folder / INDEX_FILE, records)
    write_table(folder, read_table(folder) | {"records_sha256": hashlib.sha256(records.tobytes()).hexdigest()})


def read_table(folder: Path) -> dict[str, Any]:
    """The contents of a set's shard table."""
    table: dict[str, Any] = json.loads((folder / SHARD_TABLE_FILE).read_text())
    return table


def write_table(folder: Path, table: dict[str, Any]) -> None:
    """Replace a shard table, with the checksum that it would have if the set had been indexed so."""
    contents = {key: value for key, value in table.items() if key != "checksum"}
    (folder / SHARD_TABLE_FILE).write_text(json.dumps(contents | {"checksum": json_checksum(contents)}))


def contents_of(folder: Path) -> dict[str, Any]:
    """The bytes of all files in a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class StoppedError(Exception):
    """Packing was stopped by `stop_at`."""


def stop_at(num_lines: int) -> Callable[[PackProgress], None]:
    """A display of progress that stops packing after some lines, as a killed process would."""

    def stop(at: PackProgress) -> None:
        if at.num_lines == num_lines:
            raise StoppedError

    return stop
