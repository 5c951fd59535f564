"""The journal of a packing: finished shards, their records and skipped utterances; it survives a SIGKILL."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from voxtral_dist.data.stored.index_files import write_index
from voxtral_dist.data.stored.layout import UtteranceLayout
from voxtral_dist.data.stored.shard_set import RECORD, Records, Shard
from voxtral_dist.errors import UserError
from voxtral_dist.shards.corpus.parts import CorpusPart
from voxtral_dist.shards.corpus.utterances import Refusal
from voxtral_dist.shards.remote_set import RemoteSet
from voxtral_dist.shards.skipped import SKIPPED_FILE, Skipped, read_skipped, write_refusal
from voxtral_dist.text.json_text import parse_json

JOURNAL_FILE = ".packing.jsonl"
RECORDS_FILE = ".packing.records"
# What a packing writes beside its shards and index; the journal comes last, because it says what else there is.
PACKING_FILES = (RECORDS_FILE, SKIPPED_FILE, JOURNAL_FILE)


class PackingJournal:
    """The state of a packing in a folder when its last shard was finished.

    shards: the finished shards. num_lines: lines of the corpus in them or skipped. languages: those of the index so
    far. is_complete: whether all lines of a part are packed.

    The files of a part are in `.part-NUMBER-of-COUNT` of the folder, because other machines pack into the same one.
    With `remote`, the folder is a temporary one of this machine: shards are moved to the URL, the journal is copied.

    Raises:
        UserError: the folder holds an unfinished set of another corpus or other options, or another process packs into
            it.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        part: CorpusPart | None = None,
        remote: RemoteSet | None = None,
    ) -> None:
        self._folder = folder
        self._part = part
        self._remote = remote
        self._where = remote or folder
        self._state = state_folder(folder, part)
        self._state.mkdir(exist_ok=True)
        self._paths = [self._state / name for name in (JOURNAL_FILE, RECORDS_FILE, SKIPPED_FILE)]
        if remote is not None:
            remote.restore(self._paths)
        self.is_complete = False
        self.shards: list[Shard] = []
        self.languages: list[str] = []
        self.num_lines = 0
        self._journal = _locked(self._state / JOURNAL_FILE)
        self._records = (self._state / RECORDS_FILE).open("ab")
        self._skipped = (self._state / SKIPPED_FILE).open("ab")
        try:
            self._read(identity)
        except BaseException:
            self.close()
            raise

    def skip(self, refusal: Refusal) -> None:
        """List a line that is not packed."""
        write_refusal(self._skipped, refusal)

    def finish_shard(self, shard: Shard, records: Records, num_lines: int, languages: Sequence[str]) -> None:
        """Enter a shard that is on disk, and what was skipped before its end."""
        self._records.write(records.tobytes())
        _sync(self._records)
        _sync(self._skipped)
        if self._remote is not None:
            self._remote.move_shard(Path(shard.location))
        self._enter({"shard": asdict(replace(shard, location=shard.name))}, num_lines, languages)
        self.shards.append(shard)

    def complete(self, languages: Sequence[str], layout: UtteranceLayout) -> None:
        """Write the index of all shards, and remove the journal."""
        _sync(self._skipped)
        records = np.memmap(self._state / RECORDS_FILE, dtype=RECORD, mode="r")
        write_index(self._folder, self.shards, records, list(languages), layout)
        if self._remote is not None:
            self._remote.publish(self._folder)
        self.discard()

    def complete_part(self, num_lines: int, languages: Sequence[str], layout: UtteranceLayout) -> None:
        """Enter that all lines of the part are packed; the journal stays for the merge."""
        _sync(self._skipped)
        self._enter({"layout": layout.to_json()}, num_lines, languages)
        self.is_complete = True

    def discard(self, everything: bool = False) -> None:
        """Remove the files of the journal, and `skipped.jsonl` if it is empty or `everything` is True."""
        (self._state / RECORDS_FILE).unlink()
        if everything or self._skipped.tell() == 0:
            (self._state / SKIPPED_FILE).unlink()
        (self._state / JOURNAL_FILE).unlink()
        if self._part is not None:
            self._state.rmdir()
        if self._remote is not None:
            self._remote.discard()

    def skipped(self) -> Skipped:
        """What was skipped so far."""
        self._skipped.flush()
        return read_skipped(self._state / SKIPPED_FILE)

    def _enter(self, row: dict[str, Any], num_lines: int, languages: Sequence[str]) -> None:
        state = {"num_lines": num_lines, "languages": list(languages)}
        sizes = {"record_bytes": self._records.tell(), "skipped_bytes": self._skipped.tell()}
        _append(self._journal, row | state | sizes)
        if self._remote is not None:
            self._remote.save(self._paths)

    def close(self) -> None:
        """Close the files, and release the lock."""
        for file in (self._records, self._skipped, self._journal):
            file.close()

    def _read(self, identity: dict[str, Any]) -> None:
        self._journal.seek(0)
        # A line that the interruption truncated does not count.
        whole = [line for line in self._journal if line.endswith(b"\n")]
        self._journal.truncate(sum(map(len, whole)))
        try:
            lines = [parse_json(line) for line in whole]
        except ValueError as error:
            raise self._damaged() from error
        if len(lines) <= 1:
            # No shard was finished, so this packing may be of another corpus.
            self._journal.truncate(0)
            lines = [identity]
            _append(self._journal, identity)
        elif not isinstance(lines[0], dict):
            raise self._damaged()
        elif lines[0] != json.loads(json.dumps(identity)):
            raise UserError(
                f"The folder {self._where} holds an unfinished set that was packed {differences(lines[0], identity)}"
                ": rerun that command, choose another folder, or remove this one first."
            )
        try:
            self._resume(lines[1:])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._damaged() from error

    def _damaged(self) -> UserError:
        return UserError(
            f"The journal of the unfinished set in {self._where} is damaged: remove the folder, and pack again."
        )

    def _resume(self, finished: list[dict[str, Any]]) -> None:
        self.is_complete = bool(finished) and "layout" in finished[-1]
        sizes = self._remote.sizes() if self._remote is not None and finished else None
        for line in finished[: -1 if self.is_complete else None]:
            shard = Shard(**(line["shard"] | {"location": str(self._folder / line["shard"]["location"])}))
            _check_shard(shard, sizes, self._where)
            self.shards.append(shard)
        start: dict[str, Any] = {"num_lines": 0, "languages": [], "record_bytes": 0, "skipped_bytes": 0}
        last = finished[-1] if finished else start
        self.num_lines, self.languages = last["num_lines"], last["languages"]
        for file, name in ((self._records, "record_bytes"), (self._skipped, "skipped_bytes")):
            # Truncating to a larger size would add zeros.
            if file.seek(0, os.SEEK_END) < last[name]:
                raise self._damaged()
            file.truncate(last[name])
        for file in (self._records, self._skipped):
            file.seek(0, os.SEEK_END)
        for leftover in self._folder.glob(leftover_pattern(self._part)):
            leftover.unlink()


def state_folder(folder: Path, part: CorpusPart | None) -> Path:
    """Where the journal of a packing lies."""
    return folder if part is None else folder / f".part-{part.name}"


def leftover_pattern(part: CorpusPart | None) -> str:
    """The pattern of unfinished shards of a packing."""
    return ".*.tar.tmp" if part is None else f".*-{part.name}-*.tar.tmp"


def finish_complete_packing(folder: Path, identity: dict[str, Any]) -> bool:
    """Remove what a packing left that was killed after its set was complete.

    Returns:
        Whether the set in the folder is that of this packing, so that nothing is left to do.
    """
    path = folder / JOURNAL_FILE
    if not path.is_file():
        return False
    journal = _locked(path)
    try:
        journal.seek(0)
        if parse_json(journal.readline()) != json.loads(json.dumps(identity)):
            return False
    except ValueError:
        return False
    finally:
        journal.close()
    (folder / RECORDS_FILE).unlink(missing_ok=True)
    if (folder / SKIPPED_FILE).is_file() and (folder / SKIPPED_FILE).stat().st_size == 0:
        (folder / SKIPPED_FILE).unlink()
    path.unlink(missing_ok=True)
    return True


def count_finished_shards(folder: Path, part: CorpusPart | None = None) -> int:
    """Number of shards that an interrupted packing has finished in a folder."""
    path = state_folder(folder, part) / JOURNAL_FILE
    return max(path.read_bytes().count(b"\n") - 1, 0) if path.exists() else 0


def _locked(path: Path) -> BinaryIO:
    journal = path.open("a+b")
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        journal.close()
        raise UserError(
            f"Another process is packing into {path.parent}: wait for it, or choose another folder."
        ) from error
    except OSError:
        # Some network file systems have no locks.
        return journal
    return journal


def _append(journal: BinaryIO, row: dict[str, Any]) -> None:
    journal.seek(0, os.SEEK_END)
    journal.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
    _sync(journal)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _check_shard(shard: Shard, sizes: dict[str, int] | None, where: Path | RemoteSet) -> None:
    path = Path(shard.location)
    size = (path.stat().st_size if path.is_file() else None) if sizes is None else sizes.get(shard.name)
    if size != shard.num_bytes:
        raise UserError(f"The unfinished set in {where} lacks its shard {shard.name}: remove the folder first.")


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first difference of two identities, as the end of a sentence about how a set was packed."""
    names = [name for name in {**before, **now} if before.get(name) != json.loads(json.dumps(now.get(name)))]
    first = names[0]
    if first in ("sha256", "fingerprint", "tars"):
        return "from the same place with other contents"
    return f"with `{first}` {before.get(first)!r} instead of {now.get(first)!r}"
