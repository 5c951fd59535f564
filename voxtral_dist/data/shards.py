"""Write WebDataset shards from a manifest, with their index, and say what went in and what was left out."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import mistral_common
import numpy as np
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from webdataset.writer import TarWriter

from voxtral_dist.data.audio import AudioError, decode_audio
from voxtral_dist.data.index import RECORD, SHARD_TABLE_FILE, TAR_BLOCK_BYTES, UNKNOWN_LANGUAGE, Shard, write_index
from voxtral_dist.errors import UserError

# Field names of NeMo, of Common Voice and of plain lists, by what they mean.
_AUDIO_FIELDS = ("audio_filepath", "audio", "path")
_TEXT_FIELDS = ("text", "sentence", "transcript")
_LANGUAGE_FIELDS = ("lang", "language", "locale")
_OFFSET_LIMIT_BYTES = TAR_BLOCK_BYTES * (2**32 - 1)
# The tars carry this instead of the time of packing, so that equal input makes equal shards.
_FIXED_MTIME = 0.0
# Durations are measured at the rate at which the models hear.
_SAMPLING_RATE = 16_000

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Utterance:
    """One line of a manifest: where its audio is, and the fields that are stored as the sample's json."""

    key: str
    audio_path: Path
    fields: dict[str, Any]
    place: str


@dataclass
class PackSummary:
    """What a packing run wrote and left out."""

    num_samples: int = 0
    duration_seconds: float = 0.0
    languages: Counter[str] = field(default_factory=Counter)
    left_out: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """The summary for a reader."""
        languages = ", ".join(f"{name} {count}" for name, count in self.languages.most_common())
        yield f"{self.num_samples} utterances, {self.duration_seconds / 3600:.2f} h, languages: {languages}"
        if self.left_out:
            yield f"left out {len(self.left_out)}:"
            yield from (f"  {reason}" for reason in self.left_out)


def pack_manifest(manifest: Path, out_dir: Path, shard_bytes: int, skip_bad: bool) -> PackSummary:
    """Write the utterances of a JSONL manifest as shards of about `shard_bytes` each, and their index.

    Audio is copied as it is, after decoding it once: so the index knows its true duration. With `skip_bad`, utterances
    that cannot be used are left out and listed in the summary.

    Raises:
        UserError: the manifest is unusable, the folder holds shards already, or (without `skip_bad`) an utterance is.
    """
    utterances = read_manifest(manifest, skip_bad)
    if (out_dir / SHARD_TABLE_FILE).exists():
        raise UserError(f"The folder {out_dir} holds a complete shard set already: choose another, or remove it first.")
    out_dir.mkdir(parents=True, exist_ok=True)
    with _ShardSetWriter(out_dir, shard_bytes) as writer:
        for utterance in utterances:
            try:
                writer.add(utterance)
            except (AudioError, OSError) as error:
                reason = f"{utterance.place}: the audio {utterance.audio_path} {_reason(error)}"
                writer.leave_out(reason, skip_bad)
        return writer.finish()


def read_manifest(path: Path, skip_bad: bool = False) -> Iterator[Utterance]:
    """The utterances of a JSONL manifest, in its order; audio paths are relative to the manifest.

    Raises:
        UserError: the file is missing, or a line is unusable; with `skip_bad` such lines are logged and passed over.
    """
    if not path.is_file():
        raise UserError(f"The manifest {path} does not exist: give a file of JSON lines with audio_filepath and text.")
    return _read_lines(path, skip_bad)


def _read_lines(path: Path, skip_bad: bool) -> Iterator[Utterance]:
    seen: Counter[str] = Counter()
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                utterance = _parse_line(line, path, f"{path}:{number}")
            except ValueError as error:
                _refuse(f"{path}:{number}: {error}", skip_bad)
                continue
            # Keys name samples in reports, so they must differ: a repeated one gets a number.
            seen[utterance.key] += 1
            repeat = seen[utterance.key]
            yield utterance if repeat == 1 else _renamed(utterance, f"{utterance.key}-{repeat}")


def _parse_line(line: str, manifest: Path, place: str) -> Utterance:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"the line is not valid JSON ({error.msg})") from error
    if not isinstance(row, dict):
        raise ValueError("the line is not a JSON object")
    audio = _first_of(row, _AUDIO_FIELDS)
    if not isinstance(audio, str):
        raise ValueError(f"the sample names no audio: it needs one of the fields {', '.join(_AUDIO_FIELDS)}")
    text = _first_of(row, _TEXT_FIELDS)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the sample {audio} has no text: it needs one of the fields {', '.join(_TEXT_FIELDS)}")
    known = {"text": text, "lang": _first_of(row, _LANGUAGE_FIELDS)}
    extra = {
        name: value for name, value in row.items() if name not in (*_AUDIO_FIELDS, *_TEXT_FIELDS, *_LANGUAGE_FIELDS)
    }
    # WebDataset splits names at the first dot, and folders in keys only make tars longer.
    key = Path(audio).with_suffix("").as_posix().replace("/", "_").replace(".", "_")
    return Utterance(key, manifest.parent / audio, known | extra, place)


def _first_of(row: dict[str, Any], names: Iterable[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _renamed(utterance: Utterance, key: str) -> Utterance:
    return Utterance(key, utterance.audio_path, utterance.fields, utterance.place)


def _reason(error: Exception) -> str:
    return f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)


def _refuse(reason: str, skip_bad: bool) -> None:
    if not skip_bad:
        raise UserError(f"{reason}. Correct it, or pass --skip-bad to leave such samples out.")
    log.warning("left out: %s", reason)


class _ShardSetWriter:
    """Shards under temporary names, renamed when the whole set is written."""

    def __init__(self, out_dir: Path, shard_bytes: int) -> None:
        self._out_dir = out_dir
        self._shard_bytes = min(shard_bytes, _OFFSET_LIMIT_BYTES)
        self._shards: list[Shard] = []
        self._records: list[tuple[int, int, int, int, int, int]] = []
        self._languages: list[str] = []
        self._summary = PackSummary()
        self._file: BinaryIO | None = None
        self._tar: TarWriter | None = None
        self._first_record = 0

    def __enter__(self) -> _ShardSetWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        for leftover in self._out_dir.glob(".*.tar.tmp"):
            leftover.unlink()

    def add(self, utterance: Utterance) -> None:
        """Append one sample, starting a new shard when the current one is full."""
        audio = utterance.audio_path.read_bytes()
        duration_seconds = len(decode_audio(audio, _SAMPLING_RATE)) / _SAMPLING_RATE
        tar = self._open_shard()
        start = tar.tarstream.offset
        suffix = utterance.audio_path.suffix.lstrip(".").lower() or "audio"
        tar.write({"__key__": utterance.key, suffix: audio, "json": _encode_fields(utterance.fields)})
        language = utterance.fields["lang"]
        self._records.append(
            (
                start // TAR_BLOCK_BYTES,
                (tar.tarstream.offset - start) // TAR_BLOCK_BYTES,
                round(duration_seconds * 1000),
                min(_count_tokens(utterance.fields["text"]), 2**16 - 1),
                self._number_of(language),
                0,
            )
        )
        self._summary.num_samples += 1
        self._summary.duration_seconds += duration_seconds
        self._summary.languages[language or "unknown"] += 1
        if tar.tarstream.offset >= self._shard_bytes:
            self._close_shard()

    def leave_out(self, reason: str, skip_bad: bool) -> None:
        """Refuse a sample, or count it."""
        _refuse(reason, skip_bad)
        self._summary.left_out.append(reason)

    def finish(self) -> PackSummary:
        """Close the last shard, give all their final names, and write the index."""
        if not self._records:
            raise UserError(f"Nothing was packed into {self._out_dir}: no sample of the manifest could be used.")
        self._close_shard()
        for shard in self._shards:
            _temporary(shard.path).replace(shard.path)
        write_index(self._out_dir, self._shards, np.array(self._records, dtype=RECORD), self._languages)
        return self._summary

    def _open_shard(self) -> TarWriter:
        if self._tar is None:
            self._path = self._out_dir / f"{self._out_dir.name}-{len(self._shards):06d}.tar"
            self._file = _temporary(self._path).open("wb")
            self._tar = TarWriter(self._file, mtime=_FIXED_MTIME)
            self._first_record = len(self._records)
        return self._tar

    def _close_shard(self) -> None:
        if self._tar is None or self._file is None:
            return
        self._tar.close()
        self._file.close()
        self._tar = None
        written = _temporary(self._path)
        with written.open("rb") as contents:
            digest = hashlib.file_digest(contents, "sha256").hexdigest()
        num_samples = len(self._records) - self._first_record
        self._shards.append(Shard(self._path, num_samples, written.stat().st_size, digest))

    def _number_of(self, language: str | None) -> int:
        if language is None:
            return UNKNOWN_LANGUAGE
        if language not in self._languages:
            self._languages.append(language)
        return self._languages.index(language)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _encode_fields(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, ensure_ascii=False).encode("utf-8")


def _count_tokens(text: str) -> int:
    return len(_published_vocabulary().encode(text, bos=False, eos=False))


@cache
def _published_vocabulary() -> Tekkenizer:
    """Voxtral's own, which mistral-common packages: whatever model is trained later, the index counts alike."""
    return Tekkenizer.from_file(Path(mistral_common.__file__).parent / "data" / "tekken_240911.json")
