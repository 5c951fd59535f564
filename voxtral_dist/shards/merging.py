"""One index of the parts that several machines packed into a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from voxtral_dist.data.stored.index import read_index
from voxtral_dist.data.stored.index_files import SHARD_TABLE_FILE, write_index
from voxtral_dist.data.stored.shard_set import RECORD, language_numbers
from voxtral_dist.data.stored.storage import join
from voxtral_dist.errors import UserError
from voxtral_dist.output.masking import masked
from voxtral_dist.shards.journal import JOURNAL_FILE, RECORDS_FILE, state_folder
from voxtral_dist.shards.packed_parts import FinishedPart, comparable, parts_in, parts_named, read_parts
from voxtral_dist.shards.remote_set import RemoteSet, storage_errors_named
from voxtral_dist.shards.skipped import SKIPPED_FILE, read_skipped
from voxtral_dist.shards.summary import SetSummary, summarize
from voxtral_dist.text.json_text import parse_json

_RECORDS_FILE = ".merging.records"
_DIVIDED = ("train", "dev")
# How the identities of a training set and of its development set differ.
_SIDE = "part"


def merge(out: Path | str) -> dict[str, SetSummary]:
    """Make a shard set of the parts in a folder, or in its folders `train` and `dev`.

    Tars stay where they are. The index is that of one machine which ends a shard at the end of each part. A merge that
    was interrupted is finished by another call.

    Returns:
        The summary of each set by its folder or URL.

    Raises:
        UserError: there are no parts, or some are missing, unfinished, damaged, or do not belong together.
    """
    if isinstance(out, str):
        with storage_errors_named(out):
            return _merge_remote(out.rstrip("/"))
    out_dir = out
    folders = [out_dir] if parts_in(out_dir) else [out_dir / side for side in _DIVIDED if parts_in(out_dir / side)]
    if not folders:
        complete = " It is a complete shard set already." if (out_dir / SHARD_TABLE_FILE).exists() else ""
        raise UserError(f"The folder {out_dir} holds no parts: pack them by `shards pack --part`.{complete}")
    # All is checked before anything is written.
    parts = {folder: read_parts(folder) for folder in folders if not (folder / SHARD_TABLE_FILE).exists()}
    if folders != [out_dir]:
        _check_division(out_dir, parts)
    for folder, of_folder in parts.items():
        _write_set(folder, of_folder)
    for folder in folders:
        _remove_states(folder)
    return {str(folder): _summary(str(folder), folder) for folder in folders}


def _merge_remote(url: str) -> dict[str, SetSummary]:
    sets = [RemoteSet(url)] if parts_named(RemoteSet(url).folders()) else []
    sets = sets or [one for side in _DIVIDED if parts_named((one := RemoteSet(join(url, side))).folders())]
    if not sets:
        raise UserError(f"The folder {masked(url)} holds no parts: pack them by `shards pack --part`.")
    with TemporaryDirectory(prefix="voxtral-dist-") as temporary:
        folders = {one: Path(temporary) / one.url.rpartition("/")[2] for one in sets}
        parts = {}
        for one, folder in folders.items():
            sizes = one.sizes()
            _restore_states(one, folder)
            if SHARD_TABLE_FILE not in sizes:
                parts[one] = read_parts(folder, sizes, str(one))
        if len(sets) < len(_DIVIDED) and sets[0].url != url:
            missing = next(side for side in _DIVIDED if join(url, side) != sets[0].url)
            if SHARD_TABLE_FILE not in RemoteSet(join(url, missing)).sizes():
                raise _no_side(masked(join(url, missing)))
        _refuse_other_divisions(list(map(str, parts)), list(parts.values()))
        for one, of_set in parts.items():
            _write_set(folders[one], of_set)
            one.publish(folders[one])
        summaries = {}
        for one, folder in folders.items():
            for part in parts_named(one.folders()):
                RemoteSet(one.url, part).discard()
            one.fetch_skipped(folder)
            summaries[str(one)] = _summary(one.url, folder)
        return summaries


def _restore_states(remote: RemoteSet, folder: Path) -> None:
    """Write the journals of all parts as one machine has them."""
    for part in parts_named(remote.folders()):
        state = state_folder(folder, part)
        state.mkdir(parents=True)
        RemoteSet(remote.url, part).restore([state / name for name in (JOURNAL_FILE, RECORDS_FILE, SKIPPED_FILE)])


def _summary(location: str, folder: Path) -> SetSummary:
    return summarize(read_index([location]), read_skipped(folder / SKIPPED_FILE))


def _check_division(out_dir: Path, parts: dict[Path, list[FinishedPart]]) -> None:
    """Check that a training and a development set are both there, and divide one corpus."""
    for side in _DIVIDED:
        if out_dir / side not in parts and not (out_dir / side / SHARD_TABLE_FILE).exists():
            raise _no_side(str(out_dir / side))
    _refuse_other_divisions(list(map(str, parts)), list(parts.values()))


def _no_side(folder: str) -> UserError:
    return UserError(f"The folder {folder} holds no parts: rerun the commands that pack with --dev.")


def _refuse_other_divisions(folders: Sequence[str], parts: Sequence[Sequence[FinishedPart]]) -> None:
    identities = {json.dumps(comparable(of_folder[0].identity, _SIDE, "name")) for of_folder in parts}
    if len(identities) > 1:
        raise UserError(
            f"The parts in {' and in '.join(folders)} divide different corpora, or by other options: pack one "
            "of them again."
        )


def _write_set(folder: Path, parts: Sequence[FinishedPart]) -> None:
    shards = [shard for part in parts for shard in part.shards]
    if not shards:
        reasons = [reason for part in parts for reason in read_skipped(part.skipped).first_reasons]
        first = f" (the first was skipped: {reasons[0]})" if reasons else ""
        raise UserError(f"The parts in {parts[0].where} are all empty: no utterance of the corpus is usable{first}.")
    records = folder / _RECORDS_FILE
    try:
        languages = _write_records(records, parts)
        _write_skipped(folder, parts)
        write_index(folder, shards, np.memmap(records, dtype=RECORD, mode="r"), languages, parts[0].layout)
    except OSError as error:
        raise UserError(f"The index cannot be written into {folder}: {error.strerror}. Merge again.") from error
    finally:
        with suppress(OSError):
            records.unlink(missing_ok=True)


def _write_records(path: Path, parts: Sequence[FinishedPart]) -> list[str]:
    """Write the records of all parts, with one table of languages, in the order of their first use."""
    languages: list[str] = []
    with path.open("wb") as merged:
        for part in parts:
            languages += [language for language in part.languages if language not in languages]
            numbers = language_numbers(part.languages, languages)
            for chunk in part.chunks():
                records = np.array(chunk)
                records["language"] = numbers[records["language"]]
                merged.write(records.tobytes())
    return languages


def _write_skipped(folder: Path, parts: Sequence[FinishedPart]) -> None:
    temporary = folder / f".{SKIPPED_FILE}.tmp"
    with temporary.open("wb") as merged:
        for part in parts:
            with part.skipped.open("rb") as skipped:
                shutil.copyfileobj(skipped, merged)
        is_empty = merged.tell() == 0
    temporary.replace(folder / SKIPPED_FILE)
    if is_empty:
        (folder / SKIPPED_FILE).unlink()


def _remove_states(folder: Path) -> None:
    """Remove the journals of parts that are in the index of the folder."""
    table = parse_json((folder / SHARD_TABLE_FILE).read_bytes())
    indexed = {(shard["location"], shard["sha256"]) for shard in table["shards"]}
    for part in parts_in(folder):
        state = state_folder(folder, part)
        if (state / JOURNAL_FILE).exists():
            rows = [parse_json(line) for line in (state / JOURNAL_FILE).read_bytes().splitlines()[1:]]
            packed = {(row["shard"]["location"], row["shard"]["sha256"]) for row in rows if "shard" in row}
            if not packed <= indexed:
                raise UserError(
                    f"The folder {folder} holds a complete shard set, and the part {part}, which is not in it: choose "
                    "another folder for the parts."
                )
        # The journal comes last, because it says what the part holds.
        for name in (RECORDS_FILE, SKIPPED_FILE, JOURNAL_FILE):
            (state / name).unlink(missing_ok=True)
        state.rmdir()
