"""Where utterances come from: manifests, tables, folders, Hugging Face datasets and other tars, as one stream."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from voxtral_dist.data.stored.checks import Cause, UnusableError
from voxtral_dist.data.stored.index_files import SHARD_TABLE_FILE
from voxtral_dist.data.stored.layout import AUDIO_SUFFIXES, Field, UtteranceLayout
from voxtral_dist.data.stored.storage import Storage, is_remote
from voxtral_dist.data.stored.utterance import MemberError, StoredUtterance, utterance_of
from voxtral_dist.errors import UserError
from voxtral_dist.shards.huggingface import HUB_PREFIX, is_saved_dataset, open_dataset
from voxtral_dist.shards.manifests import read_json_lines, read_table
from voxtral_dist.shards.tar_files import is_tar_pattern, tar_locations
from voxtral_dist.shards.tars import MemberGroup, TarDamage, TarScan
from voxtral_dist.shards.utterances import (
    Clip,
    FieldNames,
    Refusal,
    Utterance,
    checked_language,
    key_of,
    with_unique_keys,
)

SourceFormat = Literal["jsonl", "csv", "tsv", "folder", "huggingface", "webdataset"]
FORMATS: tuple[SourceFormat, ...] = get_args(SourceFormat)
_TABLE_SUFFIXES: dict[str, SourceFormat] = {".csv": "csv", ".tsv": "tsv"}
# Files of a folder that are surely audio; some of them libsndfile cannot decode, and then they are named as such.
_AUDIO_FILE_SUFFIXES = {f".{name}" for name in AUDIO_SUFFIXES} | {
    ".m4a",
    ".aac",
    ".wma",
    ".webm",
    ".mp4",
    ".sph",
    ".amr",
}
_CAUSE_OF_PART = {
    "audio": Cause.NO_AUDIO,
    "text": Cause.EMPTY_TEXT,
    "instruction": Cause.NO_INSTRUCTION,
    "language": Cause.UNKNOWN_LANGUAGE,
}

Line = Utterance | Refusal


@dataclass(frozen=True)
class SourceOptions:
    """What the user says of a source, and what has to be guessed where he doesn't.

    source_format: None guesses. language: of utterances that name none. members: where a tar holds what. instruction:
    that texts answer, or the name of the column that holds it; None says that texts are transcripts.
    """

    source_format: SourceFormat | None = None
    language: str | None = None
    names: FieldNames = field(default_factory=FieldNames)
    members: UtteranceLayout = field(default_factory=UtteranceLayout)
    split: str | None = None
    config: str | None = None
    instruction: Instruction | None = None


@dataclass(frozen=True)
class Instruction:
    """What the texts of a corpus answer: one instruction for all of them, or a column of instructions."""

    text: str | None = None
    column: str | None = None

    def put_to(self, line: Utterance) -> Line:
        """The utterance with its instruction; refused where it has none."""
        if self.column is None:
            return replace(line, instruction=self.text)
        found = line.extra.get(self.column)
        if not isinstance(found, str) or not found.strip():
            message = f"the sample has no instruction: its field {self.column} is absent or empty"
            return Refusal(line.place, line.key, Cause.NO_INSTRUCTION, message)
        others = {name: value for name, value in line.extra.items() if name != self.column}
        return replace(line, instruction=found, extra=others)


@dataclass(frozen=True)
class Source:
    """A corpus that can be read from its start, any number of times.

    identity: JSON values that are the same for the same corpus. num_lines: how many utterances at most, where known.
    """

    identity: dict[str, Any]
    num_lines: int | None
    _read: Callable[[], Iterable[Line]]
    _language: str | None = None
    instruction: Instruction | None = None

    def lines(self) -> Iterator[Line]:
        """Its utterances in its own order, with keys that differ, and those that are none."""
        for line in with_unique_keys(self._read()):
            yield self._completed(line) if isinstance(line, Utterance) else line

    def _completed(self, line: Utterance) -> Line:
        """With what the user says of all utterances."""
        with_language = line if line.language is not None else replace(line, language=self._language)
        return with_language if self.instruction is None else self.instruction.put_to(with_language)


def open_source(source: str, options: SourceOptions) -> Source:
    """The corpus at a path, a location or a name.

    Raises:
        UserError: there is none, or it is not of the format.
    """
    source_format = options.source_format or _guess_format(source)
    match source_format:
        case "huggingface":
            opened = _huggingface(source, options)
        case "webdataset":
            opened = _webdataset(source, options)
        case "folder":
            opened = _folder(Path(source))
        case _:
            opened = _manifest(source, source_format, options)
    identity = {"source": source, "format": source_format} | opened.identity
    if options.instruction is not None:
        identity["instruction"] = asdict(options.instruction)
    return replace(
        opened,
        identity=identity,
        _language=default_language(options.language),
        instruction=options.instruction,
    )


def _guess_format(source: str) -> SourceFormat:
    if source.startswith(HUB_PREFIX) and not source.startswith(f"{HUB_PREFIX}//"):
        return "huggingface"
    if is_tar_pattern(source) or (is_remote(source) and not Path(source).suffix):
        return "webdataset"
    path = Path(source)
    if path.is_dir():
        return _guess_folder(path)
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    return _TABLE_SUFFIXES.get(suffix.lower(), "jsonl")


def _guess_folder(folder: Path) -> SourceFormat:
    names = [entry.name for entry in os.scandir(folder)]
    if is_saved_dataset(folder) or any(name.endswith(".parquet") for name in names):
        return "huggingface"
    if any(is_tar_pattern(name) for name in names):
        return "webdataset"
    return "huggingface" if next(folder.glob("*/*.parquet"), None) else "folder"


def default_language(language: str | None) -> str | None:
    """The ISO 639-1 code that `--language` gives.

    Raises:
        UserError: there is no such language.
    """
    try:
        return checked_language(language)
    except UnusableError as error:
        raise UserError(f"`--language` {error}.") from error


def _manifest(source: str, source_format: SourceFormat, options: SourceOptions) -> Source:
    path = Path(source)
    if is_remote(source):
        raise UserError(f"The manifest {source} must be a local file: copy it; the audio that it names may be remote.")
    if not path.is_file():
        raise UserError(
            f"The manifest {path} does not exist: give a file of JSON lines with audio_filepath and text, a table, a "
            "folder of audio or of tars, or hf:NAME."
        )
    if source_format == "jsonl":
        lines = partial(read_json_lines, path, options.names)
    else:
        lines = partial(read_table, path, options.names, "," if source_format == "csv" else "\t")
    digest, num_lines = _digest_file(path)
    return Source({"sha256": digest}, None if path.suffix == ".gz" else num_lines, lines)


def _digest_file(path: Path) -> tuple[str, int]:
    digest, num_lines = hashlib.sha256(), 0
    try:
        with path.open("rb") as contents:
            while part := contents.read(2**20):
                digest.update(part)
                num_lines += part.count(b"\n")
    except OSError as error:
        raise UserError(f"The manifest {path} cannot be read: {error.strerror}.") from error
    return digest.hexdigest(), num_lines


def _folder(folder: Path) -> Source:
    if not folder.is_dir():
        raise UserError(f"The folder {folder} does not exist: give a folder with audio files and their texts.")
    # Sorted as text, so that the order is the same on every file system.
    found = (path for path in folder.rglob("*") if path.suffix.lower() in _AUDIO_FILE_SUFFIXES and path.is_file())
    files = sorted(found, key=lambda path: path.as_posix())
    if not files:
        raise UserError(f"The folder {folder} holds no audio files, no tars and no dataset: correct the path.")
    listing = "\n".join(f"{path.relative_to(folder).as_posix()}\t{path.stat().st_size}" for path in files)
    digest = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()
    return Source({"sha256": digest}, len(files), lambda: (_file_line(path, folder) for path in files))


def _file_line(path: Path, folder: Path) -> Line:
    key, beside = key_of(path.relative_to(folder).as_posix()), path.with_suffix(".txt")
    try:
        text = beside.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        return Refusal(str(path), key, Cause.EMPTY_TEXT, f"there is no text beside it: {beside.name} is missing")
    except OSError as error:
        return Refusal(str(path), key, Cause.UNREADABLE, f"its text {beside.name} cannot be read: {error.strerror}")
    except UnicodeDecodeError as error:
        return Refusal(str(path), key, Cause.EMPTY_TEXT, f"its text {beside.name} is not UTF-8 ({error.reason})")
    if not text:
        return Refusal(str(path), key, Cause.EMPTY_TEXT, f"its text {beside.name} is blank")
    return Utterance(key, Clip(str(path)), text, None, str(path))


def _huggingface(source: str, options: SourceOptions) -> Source:
    dataset = open_dataset(source, options.split, options.config, options.names)
    identity = {"split": options.split, "config": options.config, "fingerprint": dataset.fingerprint}
    return Source(identity, dataset.num_rows, dataset.lines)


def _webdataset(pattern: str, options: SourceOptions) -> Source:
    storage = Storage()
    locations = tar_locations(pattern, storage)
    if options.instruction is None:
        _refuse_to_lose_instructions(locations)
    return Source({"tars": locations}, None, lambda: _tar_lines(locations, options.members, storage))


def _refuse_to_lose_instructions(locations: Iterable[str]) -> None:
    """Our own indices say whether the texts beside them are answers; as transcripts they would be wrong."""
    for folder in sorted({Path(location).parent for location in locations if not is_remote(location)}):
        if _says_answers(folder / SHARD_TABLE_FILE):
            raise UserError(
                f"The texts in {folder} are answers to instructions, and not transcripts: pass --instruction-field "
                "instruction, or --instruction TEXT."
            )


def _says_answers(table: Path) -> bool:
    """Whether a shard table says that its texts are answers; one that is missing or damaged says nothing."""
    try:
        return json.loads(table.read_text(encoding="utf-8"))["layout"]["instruction"] is not None
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _tar_lines(locations: Iterable[str], members: UtteranceLayout, storage: Storage) -> Iterator[Line]:
    for location in locations:
        try:
            for found in TarScan(location, storage):
                yield tar_line(found, location, members)
        except OSError as error:
            raise UserError(f"The tar {location} cannot be read: {error.strerror or error}.") from error


def tar_line(found: MemberGroup | TarDamage, location: str, members: UtteranceLayout) -> Line:
    """The line of a part of a tar."""
    if isinstance(found, TarDamage):
        return Refusal(location, "", Cause.DAMAGED_TAR, str(found))
    place = f"{location}:{found.offset}"
    try:
        return tar_utterance(found, place, members)
    except UnusableError as error:
        return Refusal(place, found.key, error.cause, f"the sample {found.key} {error}")


def tar_utterance(found: MemberGroup, place: str, members: UtteranceLayout) -> Utterance:
    """The utterance of a sample in a tar.

    Raises:
        UnusableError: a member is missing, or not what it should be.
    """
    try:
        sample = utterance_of(found.key, found.members, members)
    except MemberError as error:
        raise UnusableError(_CAUSE_OF_PART[error.part], str(error)) from error
    except ValueError as error:
        raise UnusableError(Cause.NOT_JSON, f"has a member that cannot be read ({error})") from error
    return Utterance(
        key=key_of(f"{sample.key}.tar"),
        clip=Clip(f"{sample.key}.{sample.audio_suffix.rpartition('.')[2]}", sample.audio),
        text=sample.text,
        language=sample.language,
        place=place,
        instruction=sample.instruction,
        extra=_other_fields(sample, members),
    )


def _other_fields(sample: StoredUtterance, members: UtteranceLayout) -> dict[str, Any]:
    """What the json of a sample says besides what the layout names."""
    places = (members.text, members.language, members.instruction)
    known = {place.key for place in places if isinstance(place, Field) and place.member == "json"}
    return {name: value for name, value in sample.fields.items() if name not in known}
