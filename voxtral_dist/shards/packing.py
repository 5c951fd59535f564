"""WebDataset shards of a corpus, with their index: packed in parallel, in the order of the corpus, and resumable."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import numpy as np

from voxtral_dist.data.stored.index import read_index
from voxtral_dist.data.stored.index_files import SHARD_TABLE_FILE
from voxtral_dist.data.stored.layout import Field, UtteranceLayout
from voxtral_dist.data.stored.shard_set import RECORD, Shard
from voxtral_dist.data.stored.tar_members import TAR_BLOCK_BYTES
from voxtral_dist.errors import UserError
from voxtral_dist.output.masking import masked
from voxtral_dist.shards.corpus.corpus import Corpus
from voxtral_dist.shards.corpus.parts import CorpusPart
from voxtral_dist.shards.cut_audio import CutAudio
from voxtral_dist.shards.journal import JOURNAL_FILE, PackingJournal, finish_complete_packing
from voxtral_dist.shards.measures import UtteranceSpan, index_record
from voxtral_dist.shards.packed_parts import PART_NUMBER, parts_in, parts_named, read_part, refuse_other_parts
from voxtral_dist.shards.packed_utterance import PackedUtterance, PackRules, pack_line
from voxtral_dist.shards.remote_set import RemoteSet, storage_errors_named
from voxtral_dist.shards.skipped import SKIPPED_FILE, read_skipped
from voxtral_dist.shards.summary import SetSummary, summarize
from voxtral_dist.shards.tars.writing import tar_end
from voxtral_dist.shards.workers import ordered_map

_OFFSET_LIMIT_BYTES = TAR_BLOCK_BYTES * (2**32 - 1)
DEFAULT_SHARD_BYTES = 512 * 10**6


@dataclass(frozen=True)
class PackOptions:
    """How a set is packed.

    shard_bytes: size at which a shard is finished. skip_bad: skip unusable utterances instead of raising an error.
    num_workers: processes. name: prefix of the shards; None takes the name of the folder. part: which of the parts that
    are packed into the folder the corpus is; None: all of it.
    """

    shard_bytes: int = DEFAULT_SHARD_BYTES
    skip_bad: bool = False
    rules: PackRules = field(default_factory=PackRules)
    num_workers: int = 1
    name: str | None = None
    part: CorpusPart | None = None


@dataclass
class PackProgress:
    """How far a packing is.

    num_lines: lines of the corpus packed or skipped, including those before an interruption.
    num_skipped: lines skipped by this call.
    """

    num_lines: int = 0
    num_skipped: int = 0


def pack(
    corpus: Corpus, out: Path | str, options: PackOptions, on_progress: Callable[[PackProgress], None] = lambda _: None
) -> SetSummary:
    """Write the utterances of a corpus as shards of about `shard_bytes` each, and their index.

    Every utterance is decoded, so the index has its true duration. Equal corpora give equal bytes, whatever the number
    of workers. A call that was interrupted is resumed after its last finished shard.

    A part gets no index, which `merge` writes for all parts, and may be empty. A URL gets each shard when it is
    finished, so this machine needs disk space for one, and any machine can resume.

    Raises:
        UserError: the folder holds another set, all utterances are unusable, or one is and `skip_bad` is False.
    """
    if isinstance(out, Path):
        return _pack_folder(corpus, out, options, on_progress)
    with TemporaryDirectory(prefix="voxtral-dist-") as folder, storage_errors_named(out):
        staging = Path(folder) / Path(out.rstrip("/")).name
        staging.mkdir()
        return _pack_remote(corpus, RemoteSet(out, options.part), staging, options, on_progress)


def _pack_remote(
    corpus: Corpus,
    remote: RemoteSet,
    staging: Path,
    options: PackOptions,
    on_progress: Callable[[PackProgress], None],
) -> SetSummary:
    identity = _identity(corpus, staging, options)
    if SHARD_TABLE_FILE in remote.sizes():
        if options.part is not None or remote.identity() != identity:
            raise UserError(f"The folder {remote} holds a complete shard set already: choose another.")
        remote.discard()
        remote.fetch_skipped(staging)
    else:
        plain = RemoteSet(remote.url)
        refuse_other_parts(remote, parts_named(remote.folders()), options.part, plain.has_entries())
        journal = PackingJournal(staging, identity, options.part, remote)
        with closing(journal):
            if not journal.is_complete:
                _pack_into(journal, corpus, staging, options, on_progress, remote)
    if options.part is not None:
        return read_part(staging, options.part, remote.sizes(), str(remote)).summary
    return summarize(read_index([remote.url]), read_skipped(staging / SKIPPED_FILE))


def _pack_folder(
    corpus: Corpus, out_dir: Path, options: PackOptions, on_progress: Callable[[PackProgress], None]
) -> SetSummary:
    identity = _identity(corpus, out_dir, options)
    if (out_dir / SHARD_TABLE_FILE).exists():
        if options.part is not None or not finish_complete_packing(out_dir, identity):
            raise UserError(
                f"The folder {out_dir} holds a complete shard set already: choose another, or pass --overwrite."
            )
        return _summary(out_dir)
    refuse_other_parts(out_dir, parts_in(out_dir), options.part, (out_dir / JOURNAL_FILE).exists())
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        journal = PackingJournal(out_dir, identity, options.part)
    except OSError as error:
        raise UserError(f"The folder {out_dir} cannot be made: {error.strerror}.") from error
    try:
        if not journal.is_complete:
            _pack_into(journal, corpus, out_dir, options, on_progress)
    except OSError as error:
        # Audio that cannot be read is a refusal, so this error is about the disk that is written to.
        raise UserError(
            f"The shards in {out_dir} cannot be written: {error.strerror}. Fix that, and rerun the same command to "
            "resume after the finished shards."
        ) from error
    finally:
        journal.close()
    return _summary(out_dir) if options.part is None else read_part(out_dir, options.part).summary


def _summary(out_dir: Path) -> SetSummary:
    return summarize(read_index([str(out_dir)]), read_skipped(out_dir / SKIPPED_FILE))


def _identity(corpus: Corpus, out_dir: Path, options: PackOptions) -> dict[str, object]:
    """What determines the bytes of a set: only a packing with an equal identity resumes an interrupted one."""
    identity = corpus.identity | {
        "name": _name(out_dir, options),
        "shard_bytes": options.shard_bytes,
        **asdict(options.rules),
    }
    if options.part is not None:
        identity |= {"num_parts": options.part.count, PART_NUMBER: options.part.number}
    stored: dict[str, object] = json.loads(masked(json.dumps(identity)))
    return stored


def _name(out_dir: Path, options: PackOptions) -> str:
    name = options.name or out_dir.resolve().name
    if Path(name).name != name or name.startswith("."):
        raise UserError(
            f"`--name` must be a prefix of file names, without slashes or a leading dot, but is {name!r} instead."
        )
    return name


def _pack_into(
    journal: PackingJournal,
    corpus: Corpus,
    out_dir: Path,
    options: PackOptions,
    on_progress: Callable[[PackProgress], None],
    remote: RemoteSet | None = None,
) -> None:
    part, name = options.part, _name(out_dir, options)
    writer = _ShardWriter(journal, out_dir, name if part is None else f"{name}-{part.name}", options.shard_bytes)
    try:
        _pack_lines(journal, corpus, writer, options, on_progress)
        if not writer.has_utterances and part is None:
            raise UserError(_nothing_packed(journal, remote or out_dir))
        writer.finish_shard()
        instruction = Field("json", "instruction") if corpus.instruction is not None else None
        layout = UtteranceLayout(instruction=instruction)
        if part is None:
            journal.complete(writer.languages, layout)
        else:
            journal.complete_part(writer.num_lines, writer.languages, layout)
    except UserError:
        if not journal.shards:
            # There is nothing to resume from.
            writer.close()
            journal.discard(everything=True)
        raise
    finally:
        writer.close()


def _pack_lines(
    journal: PackingJournal,
    corpus: Corpus,
    writer: _ShardWriter,
    options: PackOptions,
    on_progress: Callable[[PackProgress], None],
) -> None:
    progress, cut_audio = PackProgress(journal.num_lines), CutAudio()
    rest = islice(corpus.lines(), journal.num_lines, None)
    with closing(ordered_map(partial(pack_line, rules=options.rules), rest, options.num_workers)) as all_packed:
        for packed in all_packed:
            writer.num_lines += 1
            if isinstance(packed, PackedUtterance):
                writer.add(packed)
                cut_audio.add(packed.cut_off)
            elif options.skip_bad:
                journal.skip(packed)
                progress.num_skipped += 1
            else:
                raise UserError(f"{packed.reason}. Fix it, or pass --skip-bad to skip such utterances.")
            progress.num_lines = writer.num_lines
            on_progress(progress)
    cut_audio.log_rest()


def _nothing_packed(journal: PackingJournal, out_dir: Path | RemoteSet) -> str:
    skipped = journal.skipped()
    first = f" ({skipped.count} skipped, the first: {skipped.first_reasons[0]})" if skipped.count else ""
    return f"Nothing was packed into {out_dir}: no utterance of the corpus is usable{first}."


class _ShardWriter:
    """Writes shards under temporary names; renames each and enters it in the journal when it is full."""

    def __init__(self, journal: PackingJournal, folder: Path, name: str, shard_bytes: int) -> None:
        self._journal = journal
        self._folder = folder
        self._name = name
        self._shard_bytes = min(shard_bytes, _OFFSET_LIMIT_BYTES)
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._offset = 0
        self._records: list[tuple[int, ...]] = []
        self.languages = list(journal.languages)
        self.num_lines = journal.num_lines

    @property
    def has_utterances(self) -> bool:
        """Whether the set has any utterances."""
        return bool(self._records or self._journal.shards)

    def add(self, packed: PackedUtterance) -> None:
        """Append an utterance, and finish the shard if it is full."""
        if self._file is None:
            self._file = self._temporary().open("wb")
        span = UtteranceSpan(self._offset, len(packed.contents), packed.crc32)
        self._records.append(index_record(span, packed.measures, self.languages))
        self._write(packed.contents)
        if self._offset >= self._shard_bytes:
            self.finish_shard()

    def finish_shard(self) -> None:
        """Flush the shard to disk and give it its final name; do nothing if it is empty."""
        if self._file is None:
            return
        self._write(tar_end(self._offset))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        final = self._path()
        self._temporary().replace(final)
        shard = Shard(str(final), len(self._records), self._offset, self._digest.hexdigest())
        self._journal.finish_shard(shard, np.array(self._records, dtype=RECORD), self.num_lines, self.languages)
        self._file, self._digest, self._offset, self._records = None, hashlib.sha256(), 0, []

    def close(self) -> None:
        """Remove an unfinished shard."""
        if self._file is not None:
            self._file.close()
            self._temporary().unlink(missing_ok=True)
            self._file = None

    def _write(self, contents: bytes) -> None:
        assert self._file is not None
        self._file.write(contents)
        self._digest.update(contents)
        self._offset += len(contents)

    def _path(self) -> Path:
        return self._folder / f"{self._name}-{len(self._journal.shards):06d}.tar"

    def _temporary(self) -> Path:
        final = self._path()
        return final.with_name(f".{final.name}.tmp")
