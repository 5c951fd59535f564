"""The index of tars that other tools made: each is read once, several in parallel."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from voxtral_dist.data.stored.audio import decode_pcm
from voxtral_dist.data.stored.checks import Cause, UnusableError, unusable_on_failure
from voxtral_dist.data.stored.index import read_index
from voxtral_dist.data.stored.index_files import write_index
from voxtral_dist.data.stored.layout import UtteranceLayout
from voxtral_dist.data.stored.shard_set import RECORD, Records, Shard, language_numbers
from voxtral_dist.data.stored.storage import Storage, is_remote
from voxtral_dist.errors import UserError, first_line
from voxtral_dist.shards.corpus.tar_utterances import tar_utterance
from voxtral_dist.shards.corpus.utterances import Refusal
from voxtral_dist.shards.cut_audio import CutAudio
from voxtral_dist.shards.measures import SAMPLING_RATE, UtteranceSpan, index_record, measure
from voxtral_dist.shards.skipped import SKIPPED_FILE, read_skipped, write_refusal
from voxtral_dist.shards.summary import SetSummary, summarize
from voxtral_dist.shards.tars.files import COMPRESSED_SUFFIXES, PIPE_PREFIX, tar_locations
from voxtral_dist.shards.tars.members import TarDamage
from voxtral_dist.shards.tars.scan import MemberGroup, TarScan
from voxtral_dist.shards.workers import ordered_map
from voxtral_dist.text.languages import warn_of_shared_code

_RECORDS_FILE = ".indexing.records"


@dataclass(frozen=True)
class IndexedShard:
    """One indexed tar: its records, the languages that they number, and the refusals of unusable utterances.

    cut_off: a sentence for each audio that ends before its file says it does. labels: languages as they are written.
    """

    shard: Shard
    records: Records
    languages: tuple[str, ...]
    refusals: tuple[Refusal, ...]
    cut_off: tuple[str, ...] = ()
    labels: frozenset[str | None] = frozenset()


def index_tars(
    pattern: str,
    out_dir: Path | None,
    layout: UtteranceLayout,
    max_chars_per_second: float,
    num_workers: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> SetSummary:
    """Write the index of the tars of a folder or pattern, beside them or into `out_dir`.

    Unusable utterances and damaged parts of tars are skipped, and listed in `skipped.jsonl`.

    Raises:
        UserError: there are no tars, they cannot be read or indexed where they are, or no utterance is usable.
    """
    locations = tar_locations(pattern, Storage())
    folder = out_dir or _folder_of(locations)
    locations = _as_stored(locations, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _records_file(folder) as records_path:
            with closing(_index_all(locations, layout, max_chars_per_second, num_workers)) as indexed:
                shards, languages = _collect(indexed, records_path, folder, len(locations), on_progress)
            if not any(shard.num_utterances for shard in shards):
                raise UserError(_nothing_indexed(pattern, folder))
            write_index(folder, shards, np.memmap(records_path, dtype=RECORD, mode="r"), languages, layout)
    except OSError as error:
        raise UserError(
            f"The index cannot be written into {folder}: {error.strerror}. Pass another folder after the pattern."
        ) from error
    return summarize(read_index([str(folder)]), read_skipped(folder / SKIPPED_FILE))


def index_tar(location: str, layout: UtteranceLayout, max_chars_per_second: float) -> IndexedShard:
    """Read a tar from its first byte to its last, and index it.

    Raises:
        UserError: the tar cannot be read.
    """
    rows: list[tuple[int, ...]] = []
    refusals: list[Refusal] = []
    seen = _Seen()
    try:
        scan = TarScan(location, Storage())
        for found in scan:
            try:
                with unusable_on_failure():
                    rows.append(_row(found, location, layout, max_chars_per_second, seen))
            except UnusableError as error:
                refusals.append(_refusal(found, location, error))
    except OSError as error:
        raise UserError(f"The tar {location} cannot be read: {error.strerror or first_line(error)}.") from error
    shard = Shard(location, len(rows), scan.num_bytes, scan.sha256)
    records = np.array(rows, dtype=RECORD)
    return IndexedShard(
        shard, records, tuple(seen.languages), tuple(refusals), tuple(seen.cut_off), frozenset(seen.labels)
    )


@dataclass(frozen=True)
class _Seen:
    """What the utterances of a tar had so far; see `IndexedShard`."""

    languages: list[str] = field(default_factory=list)
    cut_off: list[str] = field(default_factory=list)
    labels: set[str | None] = field(default_factory=set)


def _row(
    found: MemberGroup | TarDamage,
    location: str,
    layout: UtteranceLayout,
    max_chars_per_second: float,
    seen: _Seen,
) -> tuple[int, ...]:
    if isinstance(found, TarDamage):
        raise UnusableError(Cause.DAMAGED_TAR, str(found))
    utterance = tar_utterance(found, location, layout, seen.labels.add)
    notes: list[str] = []
    pcm = decode_pcm(utterance.audio.contents or b"", SAMPLING_RATE, notes.append)
    measures = measure(utterance, pcm, max_chars_per_second)
    seen.cut_off.extend(f"The audio of {found.key} in {location} {note}." for note in notes)
    span = UtteranceSpan(found.offset, len(found.contents), zlib.crc32(found.contents))
    return index_record(span, measures, seen.languages)


def _refusal(found: MemberGroup | TarDamage, location: str, error: UnusableError) -> Refusal:
    if isinstance(found, TarDamage):
        return Refusal(location, "", error.cause, str(error))
    return Refusal(f"{location}:{found.offset}", found.key, error.cause, f"the utterance {found.key} {error}")


def _index_all(
    locations: list[str], layout: UtteranceLayout, max_chars_per_second: float, num_workers: int
) -> Generator[IndexedShard, None, None]:
    one = partial(index_tar, layout=layout, max_chars_per_second=max_chars_per_second)
    return ordered_map(one, locations, min(num_workers, len(locations)), batch_size=1)


def _collect(
    indexed: Iterator[IndexedShard],
    records_path: Path,
    folder: Path,
    num_shards: int,
    on_progress: Callable[[int, int], None],
) -> tuple[list[Shard], list[str]]:
    """Write the records of all shards to one file, with one table of languages."""
    shards: list[Shard] = []
    languages: list[str] = []
    cut_audio = CutAudio()
    temporary = folder / f".{SKIPPED_FILE}.tmp"
    with records_path.open("wb") as records, temporary.open("wb") as skipped:
        for part in indexed:
            languages += [language for language in part.languages if language not in languages]
            part.records["language"] = language_numbers(part.languages, languages)[part.records["language"]]
            records.write(part.records.tobytes())
            for refusal in part.refusals:
                write_refusal(skipped, refusal)
            for sentence in part.cut_off:
                cut_audio.add(sentence)
            for label in part.labels:
                warn_of_shared_code(label)
            shards.append(part.shard)
            on_progress(len(shards), num_shards)
    cut_audio.log_rest()
    temporary.replace(folder / SKIPPED_FILE)
    if (folder / SKIPPED_FILE).stat().st_size == 0:
        (folder / SKIPPED_FILE).unlink()
    return shards, languages


def _folder_of(locations: list[str]) -> Path:
    folders = {location.rpartition("/")[0] or "." for location in locations}
    if len(folders) == 1 and not is_remote(locations[0]):
        return Path(folders.pop())
    where = "remote" if is_remote(locations[0]) else "in several folders"
    raise UserError(f"The tars are {where}: pass a folder for their index after the pattern.")


def _as_stored(locations: list[str], folder: Path) -> list[str]:
    """The locations for the shard table: names of tars beside it, absolute paths or URLs of others."""
    for location in locations:
        if location.startswith(PIPE_PREFIX) or location.endswith(COMPRESSED_SUFFIXES):
            raise UserError(
                f"The tar {location} is compressed or a pipe, so single utterances cannot be read from it: "
                "convert it by `shards pack`."
            )
    return [
        location
        if is_remote(location)
        else str(folder / Path(location).name)
        if Path(location).resolve().parent == folder.resolve()
        else str(Path(location).resolve())
        for location in locations
    ]


@contextmanager
def _records_file(folder: Path) -> Iterator[Path]:
    path = folder / _RECORDS_FILE
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        (folder / f".{SKIPPED_FILE}.tmp").unlink(missing_ok=True)


def _nothing_indexed(pattern: str, folder: Path) -> str:
    skipped = read_skipped(folder / SKIPPED_FILE)
    first = f" ({skipped.count} skipped, the first: {skipped.first_reasons[0]})" if skipped.count else ""
    return f"No utterance in {pattern} is usable{first}: name their members by --text-member and --audio-member."
