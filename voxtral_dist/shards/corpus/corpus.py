"""A corpus of any format as one stream of utterances."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from voxtral_dist.data.stored.checks import Cause, UnusableError
from voxtral_dist.data.stored.index_files import SHARD_TABLE_FILE
from voxtral_dist.data.stored.layout import UtteranceLayout
from voxtral_dist.data.stored.storage import Storage, is_remote
from voxtral_dist.errors import UserError
from voxtral_dist.shards.corpus.fields import FieldNames, checked_language
from voxtral_dist.shards.corpus.folder import audio_files, read_audio_file
from voxtral_dist.shards.corpus.formats import CorpusFormat
from voxtral_dist.shards.corpus.huggingface import HUB_PREFIX, is_saved_dataset, open_dataset
from voxtral_dist.shards.corpus.manifests import read_json_lines, read_table
from voxtral_dist.shards.corpus.tar_utterances import tar_lines
from voxtral_dist.shards.corpus.utterances import Line, Refusal, Utterance, with_unique_keys
from voxtral_dist.shards.tars.files import is_tar_pattern, tar_locations
from voxtral_dist.text.json_text import parse_json

_TABLE_SUFFIXES: dict[str, CorpusFormat] = {".csv": "csv", ".tsv": "tsv"}


@dataclass(frozen=True)
class CorpusOptions:
    """How a corpus is read.

    corpus_format: None guesses it from the name. language: for utterances without one. names: of columns in tables.
    layout: of tars. split, config: of a Hugging Face dataset. instruction: None if texts are transcripts.
    """

    corpus_format: CorpusFormat | None = None
    language: str | None = None
    names: FieldNames = field(default_factory=FieldNames)
    layout: UtteranceLayout = field(default_factory=UtteranceLayout)
    split: str | None = None
    config: str | None = None
    instruction: Instruction | None = None


@dataclass(frozen=True)
class Instruction:
    """What the texts of a corpus answer: one instruction for all texts, or a column of instructions."""

    text: str | None = None
    column: str | None = None

    def added_to(self, line: Utterance) -> Line:
        """The utterance with its instruction; refused if it has none."""
        if self.column is None:
            return replace(line, instruction=self.text)
        found = line.extra.get(self.column)
        if not isinstance(found, str) or not found.strip():
            message = f"the utterance has no instruction: its field {self.column} is missing or empty"
            return Refusal(line.place, line.key, Cause.NO_INSTRUCTION, message)
        others = {name: value for name, value in line.extra.items() if name != self.column}
        return replace(line, instruction=found, extra=others)


@dataclass(frozen=True)
class Corpus:
    """A corpus that can be read from its start any number of times.

    identity: JSON values that are equal for equal corpora. num_lines: upper limit of utterances; None if unknown.
    instruction: what the texts answer; None if they are transcripts.
    """

    identity: dict[str, Any]
    num_lines: int | None
    _read: Callable[[], Iterable[Line]]
    _language: str | None = None
    instruction: Instruction | None = None

    def lines(self) -> Iterator[Line]:
        """The utterances in the order of the corpus with unique keys, and refusals of unusable ones."""
        for line in with_unique_keys(self._read()):
            yield self._completed(line) if isinstance(line, Utterance) else line

    def _completed(self, line: Utterance) -> Line:
        """The utterance with the language and instruction of the whole corpus."""
        with_language = line if line.language is not None else replace(line, language=self._language)
        return with_language if self.instruction is None else self.instruction.added_to(with_language)


def open_corpus(source: str, options: CorpusOptions) -> Corpus:
    """Open the corpus at a path, URL, pattern or name.

    Raises:
        UserError: it does not exist, or is not of its format.
    """
    corpus_format = options.corpus_format or _guess_format(source)
    match corpus_format:
        case "huggingface":
            opened = _huggingface(source, options)
        case "webdataset":
            opened = _webdataset(source, options)
        case "folder":
            opened = _folder(Path(source))
        case _:
            opened = _manifest(source, corpus_format, options)
    identity = {"source": source, "format": corpus_format} | opened.identity
    if options.instruction is not None:
        identity["instruction"] = asdict(options.instruction)
    return replace(
        opened,
        identity=identity,
        _language=default_language(options.language),
        instruction=options.instruction,
    )


def _guess_format(source: str) -> CorpusFormat:
    if source.startswith(HUB_PREFIX) and not source.startswith(f"{HUB_PREFIX}//"):
        return "huggingface"
    if is_tar_pattern(source) or (is_remote(source) and not Path(source).suffix):
        return "webdataset"
    path = Path(source)
    if path.is_dir():
        return _guess_folder(path)
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    return _TABLE_SUFFIXES.get(suffix.lower(), "jsonl")


def _guess_folder(folder: Path) -> CorpusFormat:
    names = [entry.name for entry in os.scandir(folder)]
    if is_saved_dataset(folder) or any(name.endswith(".parquet") for name in names):
        return "huggingface"
    if any(is_tar_pattern(name) for name in names):
        return "webdataset"
    return "huggingface" if next(folder.glob("*/*.parquet"), None) else "folder"


def default_language(language: str | None) -> str | None:
    """The ISO 639-1 code of `--language`.

    Raises:
        UserError: the language is unknown.
    """
    try:
        return checked_language(language)
    except UnusableError as error:
        raise UserError(f"`--language` {error}.") from error


def _manifest(source: str, corpus_format: CorpusFormat, options: CorpusOptions) -> Corpus:
    path = Path(source)
    if is_remote(source):
        raise UserError(
            f"The manifest {source} must be a local file: download it. The audio that it names may be remote."
        )
    if not path.is_file():
        raise UserError(
            f"The manifest {path} does not exist: give a file of JSON lines with audio_filepath and text, a table, a "
            "folder of audio or of tars, or hf:NAME."
        )
    if corpus_format == "jsonl":
        lines = partial(read_json_lines, path, options.names)
    else:
        lines = partial(read_table, path, options.names, "," if corpus_format == "csv" else "\t")
    digest, num_lines = _digest_file(path)
    return Corpus({"sha256": digest}, None if path.suffix == ".gz" else num_lines, lines)


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


def _folder(folder: Path) -> Corpus:
    files = audio_files(folder)
    listing = "\n".join(f"{path.relative_to(folder).as_posix()}\t{path.stat().st_size}" for path in files)
    digest = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()
    return Corpus({"sha256": digest}, len(files), lambda: (read_audio_file(path, folder) for path in files))


def _huggingface(source: str, options: CorpusOptions) -> Corpus:
    dataset = open_dataset(source, options.split, options.config, options.names)
    identity = {"split": options.split, "config": options.config, "fingerprint": dataset.fingerprint}
    return Corpus(identity, dataset.num_rows, dataset.lines)


def _webdataset(pattern: str, options: CorpusOptions) -> Corpus:
    storage = Storage()
    locations = tar_locations(pattern, storage)
    if options.instruction is None:
        _refuse_to_lose_instructions(locations)
    return Corpus({"tars": locations}, None, lambda: tar_lines(locations, options.layout, storage))


def _refuse_to_lose_instructions(locations: Iterable[str]) -> None:
    """Refuse answers as transcripts: the index beside tars says which of both their texts are."""
    for folder in sorted({Path(location).parent for location in locations if not is_remote(location)}):
        if _says_answers(folder / SHARD_TABLE_FILE):
            raise UserError(
                f"The texts in {folder} are answers to instructions, not transcripts: pass --instruction-field "
                "instruction, or --instruction TEXT."
            )


def _says_answers(table: Path) -> bool:
    """Whether the texts of a shard set are answers; False if its table is missing or damaged."""
    try:
        return parse_json(table.read_bytes())["layout"]["instruction"] is not None
    except (OSError, ValueError, KeyError, TypeError):
        return False
