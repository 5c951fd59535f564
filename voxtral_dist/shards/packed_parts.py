"""The parts of a set that several machines pack into one folder: which there are, and what the finished ones hold."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from voxtral_dist.data.stored.index import RecordChunk
from voxtral_dist.data.stored.layout import UtteranceLayout
from voxtral_dist.data.stored.shard_set import RECORD, Records, Shard
from voxtral_dist.data.stored.storage import is_remote
from voxtral_dist.errors import UserError
from voxtral_dist.shards.corpus.parts import CorpusPart
from voxtral_dist.shards.journal import JOURNAL_FILE, RECORDS_FILE, differences, state_folder
from voxtral_dist.shards.remote_set import RemoteSet
from voxtral_dist.shards.skipped import SKIPPED_FILE, read_skipped
from voxtral_dist.shards.summary import SetSummary, summarize_chunks
from voxtral_dist.text.json_text import parse_json

# In the identity of a part: all else is equal in the parts of a set.
PART_NUMBER = "part_number"
_STATE = re.compile(r"\.part-(\d+)-of-(\d+)")
_CHUNK_RECORDS = 2**20
_NUM_NAMED = 10


@dataclass(frozen=True)
class FinishedPart:
    """A part whose lines are all packed.

    identity: that of its packing. folder: that of the set. languages: those that its records number. where: the set in
    messages.
    """

    part: CorpusPart
    folder: Path
    identity: dict[str, Any]
    shards: tuple[Shard, ...]
    languages: tuple[str, ...]
    layout: UtteranceLayout
    where: str

    @property
    def state(self) -> Path:
        """The folder of its journal."""
        return state_folder(self.folder, self.part)

    @property
    def skipped(self) -> Path:
        """The file with what it skipped."""
        return self.state / SKIPPED_FILE

    def chunks(self) -> Iterator[Records]:
        """Its records in order, as views of a memory map."""
        if not self.shards:
            return
        records = np.memmap(self.state / RECORDS_FILE, dtype=RECORD, mode="r")
        for start in range(0, len(records), _CHUNK_RECORDS):
            yield records[start : start + _CHUNK_RECORDS]

    @property
    def summary(self) -> SetSummary:
        """What it holds."""
        chunks = (
            RecordChunk(number * _CHUNK_RECORDS, records, records["language"])
            for number, records in enumerate(self.chunks())
        )
        return summarize_chunks(chunks, self.shards, self.languages, read_skipped(self.skipped))


def parts_in(folder: Path) -> list[CorpusPart]:
    """The parts that a folder holds, finished or not, in their order."""
    return parts_named(path.name for path in folder.glob(".part-*"))


def parts_named(folders: Iterable[str]) -> list[CorpusPart]:
    """The parts whose journals are in folders of these names, in their order."""
    matches = map(_STATE.fullmatch, folders)
    parts = [CorpusPart(int(found[1]), int(found[2])) for found in matches if found is not None]
    return sorted(parts, key=lambda part: (part.count, part.number))


def refuse_other_parts(
    folder: Path | RemoteSet, parts: Sequence[CorpusPart], part: CorpusPart | None, has_plain_journal: bool
) -> None:
    """Refuse to pack into a folder whose parts are not of the same division.

    Raises:
        UserError: it holds parts and all is to be packed, parts of another number, or an unfinished set of one machine.
    """
    other = next((found for found in parts if part is None or found.count != part.count), None)
    if other is not None:
        raise UserError(
            f"The folder {folder} holds the part {other} of a set that several machines pack: merge its parts by "
            f"`voxtral-dist shards merge {folder}`, or choose another folder."
        )
    if part is not None and has_plain_journal:
        raise UserError(
            f"The folder {folder} holds an unfinished set that was packed without --part: choose another folder, or "
            "remove this one first."
        )


def read_part(folder: Path, part: CorpusPart, sizes: Mapping[str, int] | None = None, where: str = "") -> FinishedPart:
    """Read what a finished part holds.

    Args:
        folder: that of the set.
        part: which part.
        sizes: those of the tars by name, where these are elsewhere; None: they are in the folder.
        where: the set in messages, where the folder is a copy of its journals.

    Raises:
        UserError: it is unfinished, its journal is damaged, or files are missing.
    """
    found = _read(folder, part, sizes, where or str(folder))
    if found is None:
        raise UserError(f"The part {part} in {where or folder} is unfinished: rerun the command that packs it.")
    return found


def read_parts(folder: Path, sizes: Mapping[str, int] | None = None, where: str = "") -> list[FinishedPart]:
    """Read all parts of a set, and check that they belong together; arguments as of `read_part`.

    Raises:
        UserError: parts are missing, unfinished, damaged, or of other corpora or options than most; it names them.
    """
    present = parts_in(folder)
    counts = sorted({part.count for part in present})
    if len(counts) > 1:
        raise UserError(
            f"The folder {where or folder} holds parts of {counts[0]} and of {counts[1]}: remove those that do not "
            f"belong to the set, such as {state_folder(folder, present[0]).name}."
        )
    wanted = [CorpusPart(number, counts[0]) for number in range(1, counts[0] + 1)]
    found = {part: _read(folder, part, sizes, where or str(folder)) for part in present}
    missing = [part for part in wanted if part not in found]
    unfinished = [part for part, contents in found.items() if contents is None]
    if missing or unfinished:
        sentences = {"lacks": missing, "has unfinished": unfinished}
        named = [f"{what} {_listed(parts)}" for what, parts in sentences.items() if parts]
        raise UserError(
            f"The set in {where or folder} {' and '.join(named)}: pack them by the command of the other parts with "
            f"`--part {(missing or unfinished)[0]}`, then merge again."
        )
    parts = [contents for contents in found.values() if contents is not None]
    _refuse_mismatched(parts)
    return parts


def comparable(identity: dict[str, Any], *but: str) -> dict[str, Any]:
    """An identity without what may differ."""
    return {name: value for name, value in identity.items() if name not in (PART_NUMBER, *but)}


def _refuse_mismatched(parts: Sequence[FinishedPart]) -> None:
    texts = [json.dumps([comparable(part.identity), part.layout.to_json()], sort_keys=True) for part in parts]
    usual = texts.index(Counter(texts).most_common(1)[0][0])
    odd = [part for part, text in zip(parts, texts, strict=True) if text != texts[usual]]
    if odd:
        how = differences(comparable(odd[0].identity), comparable(parts[usual].identity))
        raise UserError(
            f"The parts in {parts[0].where} do not belong together: {_listed([part.part for part in odd])} was packed "
            f"{how} in {parts[usual].part}: {_remedy(odd[0].part, odd[0].where)}, by the same command as the others."
        )


def _listed(parts: Sequence[CorpusPart]) -> str:
    names = ", ".join(map(str, parts[:_NUM_NAMED]))
    more = f" and {len(parts) - _NUM_NAMED} more" if len(parts) > _NUM_NAMED else ""
    return f"part{'s' if len(parts) > 1 else ''} {names}{more}"


def _read(folder: Path, part: CorpusPart, sizes: Mapping[str, int] | None, where: str) -> FinishedPart | None:
    """A part; None if it is unfinished."""
    state = state_folder(folder, part)
    try:
        lines = (state / JOURNAL_FILE).read_bytes().splitlines(keepends=True)
        if len(lines) < 2 or not lines[-1].endswith(b"\n"):
            return None
        identity, *rows = map(parse_json, lines)
        last = rows.pop()
        if "layout" not in last:
            return None
        shards = tuple(Shard(**(row["shard"] | {"location": str(folder / row["shard"]["location"])})) for row in rows)
        layout = UtteranceLayout.from_json(last["layout"])
        found = FinishedPart(part, folder, identity, shards, tuple(last["languages"]), layout, where)
        _check_files(found, int(last["record_bytes"]), int(last["skipped_bytes"]), sizes)
    except FileNotFoundError:
        return None
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"The journal of the part {part} in {where} is damaged: {_remedy(part, where)}.") from error
    return found


def _check_files(
    found: FinishedPart, record_bytes: int, skipped_bytes: int, sizes_elsewhere: Mapping[str, int] | None
) -> None:
    num_utterances = sum(shard.num_utterances for shard in found.shards)
    sizes = {found.state / RECORDS_FILE: num_utterances * RECORD.itemsize, found.skipped: skipped_bytes}
    if sizes_elsewhere is None:
        sizes |= {Path(shard.location): shard.num_bytes for shard in found.shards}
    damaged = next((path for path, size in sizes.items() if not path.is_file() or path.stat().st_size != size), None)
    if damaged is None and sizes_elsewhere is not None:
        tars = (shard for shard in found.shards if sizes_elsewhere.get(shard.name) != shard.num_bytes)
        damaged = next((Path(shard.location) for shard in tars), None)
    if damaged is not None or record_bytes != num_utterances * RECORD.itemsize:
        name = (damaged or found.state / RECORDS_FILE).relative_to(found.folder)
        raise UserError(
            f"The part {found.part} in {found.where} lacks its file {name}, or that has another size than when it was "
            f"packed: {_remedy(found.part, found.where)}."
        )


def _remedy(part: CorpusPart, where: str) -> str:
    if is_remote(where):
        return f"remove the folder {state_folder(Path(), part)} there, and pack the part again"
    return "pack the part again by --overwrite"
