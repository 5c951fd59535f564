"""The parts of a set that several machines pack into one folder: which there are, and what the finished ones hold."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from voxtral_dist.data.stored.index import RecordChunk
from voxtral_dist.data.stored.layout import UtteranceLayout
from voxtral_dist.data.stored.shard_set import RECORD, Records, Shard
from voxtral_dist.errors import UserError
from voxtral_dist.shards.corpus.parts import CorpusPart
from voxtral_dist.shards.journal import JOURNAL_FILE, RECORDS_FILE, differences, state_folder
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

    identity: that of its packing. folder: that of the set. languages: those that its records number.
    """

    part: CorpusPart
    folder: Path
    identity: dict[str, Any]
    shards: tuple[Shard, ...]
    languages: tuple[str, ...]
    layout: UtteranceLayout

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
    matches = (_STATE.fullmatch(path.name) for path in folder.glob(".part-*"))
    parts = [CorpusPart(int(found[1]), int(found[2])) for found in matches if found is not None]
    return sorted(parts, key=lambda part: (part.count, part.number))


def refuse_other_parts(folder: Path, part: CorpusPart | None) -> None:
    """Refuse to pack into a folder whose parts are not of the same division.

    Raises:
        UserError: it holds parts and all is to be packed, parts of another number, or an unfinished set of one machine.
    """
    other = next((found for found in parts_in(folder) if part is None or found.count != part.count), None)
    if other is not None:
        raise UserError(
            f"The folder {folder} holds the part {other} of a set that several machines pack: merge its parts by "
            f"`voxtral-dist shards merge {folder}`, or choose another folder."
        )
    if part is not None and (folder / JOURNAL_FILE).exists():
        raise UserError(
            f"The folder {folder} holds an unfinished set that was packed without --part: choose another folder, or "
            "remove this one first."
        )


def read_part(folder: Path, part: CorpusPart) -> FinishedPart:
    """Read what a finished part holds.

    Raises:
        UserError: it is unfinished, its journal is damaged, or files are missing.
    """
    found = _read(folder, part)
    if found is None:
        raise UserError(f"The part {part} in {folder} is unfinished: rerun the command that packs it.")
    return found


def read_parts(folder: Path) -> list[FinishedPart]:
    """Read all parts of a set, and check that they belong together.

    Raises:
        UserError: parts are missing, unfinished, damaged, or of other corpora or options than most; it names them.
    """
    present = parts_in(folder)
    counts = sorted({part.count for part in present})
    if len(counts) > 1:
        raise UserError(
            f"The folder {folder} holds parts of {counts[0]} and of {counts[1]}: remove those that do not belong to "
            f"the set, such as {state_folder(folder, present[0])}."
        )
    wanted = [CorpusPart(number, counts[0]) for number in range(1, counts[0] + 1)]
    found = {part: _read(folder, part) for part in present}
    missing = [part for part in wanted if part not in found]
    unfinished = [part for part, contents in found.items() if contents is None]
    if missing or unfinished:
        sentences = {"lacks": missing, "has unfinished": unfinished}
        named = [f"{what} {_listed(parts)}" for what, parts in sentences.items() if parts]
        raise UserError(
            f"The set in {folder} {' and '.join(named)}: pack them by the command of the other parts with `--part "
            f"{(missing or unfinished)[0]}`, then merge again."
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
            f"The parts in {parts[0].folder} do not belong together: {_listed([part.part for part in odd])} was packed "
            f"{how} in {parts[usual].part}. Pack it again by the same command as the others, with --overwrite."
        )


def _listed(parts: Sequence[CorpusPart]) -> str:
    names = ", ".join(map(str, parts[:_NUM_NAMED]))
    more = f" and {len(parts) - _NUM_NAMED} more" if len(parts) > _NUM_NAMED else ""
    return f"part{'s' if len(parts) > 1 else ''} {names}{more}"


def _read(folder: Path, part: CorpusPart) -> FinishedPart | None:
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
        found = FinishedPart(part, folder, identity, shards, tuple(last["languages"]), layout)
        _check_files(found, int(last["record_bytes"]), int(last["skipped_bytes"]))
    except FileNotFoundError:
        return None
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"The journal of the part {part} in {folder} is damaged: pack the part again by --overwrite."
        ) from error
    return found


def _check_files(found: FinishedPart, record_bytes: int, skipped_bytes: int) -> None:
    num_utterances = sum(shard.num_utterances for shard in found.shards)
    sizes = {found.state / RECORDS_FILE: num_utterances * RECORD.itemsize, found.skipped: skipped_bytes}
    sizes |= {Path(shard.location): shard.num_bytes for shard in found.shards}
    damaged = next((path for path, size in sizes.items() if not path.is_file() or path.stat().st_size != size), None)
    if damaged is not None or record_bytes != num_utterances * RECORD.itemsize:
        name = (damaged or found.state / RECORDS_FILE).relative_to(found.folder)
        raise UserError(
            f"The part {found.part} in {found.folder} lacks its file {name}, or that has another size than when it was "
            "packed: pack the part again by --overwrite."
        )
