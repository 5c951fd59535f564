"""Write WebDataset shards from a manifest, with their index, and say what went in and what was left out."""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import mistral_common
import numpy as np
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from webdataset.writer import TarWriter

from voxtral_dist.data.audio import AudioError, decode_audio
from voxtral_dist.data.index import LARGEST_COUNT, RECORD, SHARD_TABLE_FILE, UNKNOWN_LANGUAGE, Shard, write_index
from voxtral_dist.data.manifests import Refusal, Utterance, read_manifest
from voxtral_dist.data.members import TAR_BLOCK_BYTES
from voxtral_dist.errors import UserError

_OFFSET_LIMIT_BYTES = TAR_BLOCK_BYTES * (2**32 - 1)
# The tars carry this instead of the time of packing, so that equal input makes equal shards. A whole number: a fraction
# would take an extended header of 1,024 bytes for every member.
_FIXED_MTIME = 0
# Durations are measured at the rate at which the models hear.
_SAMPLING_RATE = 16_000

log = logging.getLogger(__name__)


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
    if (out_dir / SHARD_TABLE_FILE).exists():
        raise UserError(f"The folder {out_dir} holds a complete shard set already: choose another, or remove it first.")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder {out_dir} cannot be made: {error.strerror}.") from error
    try:
        with _ShardSetWriter(out_dir, shard_bytes) as writer:
            _pack_lines(read_manifest(manifest), writer, skip_bad)
            return writer.finish()
    except OSError as error:
        # Sources that cannot be read are refusals: this is the disk that is written to.
        raise UserError(f"The shards in {out_dir} cannot be written: {error.strerror}. Nothing was kept.") from error


def _pack_lines(lines: Iterator[Utterance | Refusal], writer: _ShardSetWriter, skip_bad: bool) -> None:
    for line in lines:
        loaded = line if isinstance(line, Refusal) else _load(line)
        if isinstance(loaded, _Loaded):
            writer.add(loaded)
        elif skip_bad:
            writer.leave_out(loaded)
        else:
            raise UserError(f"{loaded.reason}. Correct it, or pass --skip-bad to leave such samples out.")


@dataclass(frozen=True)
class _Loaded:
    """An utterance with the bytes of its audio, which decode to this duration."""

    utterance: Utterance
    audio: bytes
    duration_seconds: float


def _load(utterance: Utterance) -> _Loaded | Refusal:
    start = f"{utterance.place}: the audio {utterance.audio_path}"
    try:
        audio = utterance.audio_path.read_bytes()
        num_samples = len(decode_audio(audio, _SAMPLING_RATE))
    except OSError as error:
        return Refusal(f"{start} cannot be read: {error.strerror}")
    except AudioError as error:
        return Refusal(f"{start} {error}")
    return _Loaded(utterance, audio, num_samples / _SAMPLING_RATE)


class _ShardSetWriter:
    """Shards under temporary names, renamed when the whole set is written."""

    def __init__(self, out_dir: Path, shard_bytes: int) -> None:
        self._out_dir = out_dir
        self._shard_bytes = min(shard_bytes, _OFFSET_LIMIT_BYTES)
        self._shards: list[Shard] = []
        self._records: list[tuple[int, ...]] = []
        self._languages: list[str] = []
        self._summary = PackSummary()
        self._file: BinaryIO | None = None
        self._tar: TarWriter | None = None
        self._first_record = 0

    def __enter__(self) -> _ShardSetWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tar is not None:
            self._tar.close()
        if self._file is not None:
            self._file.close()
        for leftover in self._out_dir.glob(".*.tar.tmp"):
            leftover.unlink()

    def add(self, loaded: _Loaded) -> None:
        """Append one sample, starting a new shard when the current one is full."""
        utterance, audio, duration_seconds = loaded.utterance, loaded.audio, loaded.duration_seconds
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
                0,
                min(_count_tokens(utterance.fields["text"]), LARGEST_COUNT),
                min(len(utterance.fields["text"]), LARGEST_COUNT),
                self._number_of(language),
                0,
            )
        )
        self._summary.num_samples += 1
        self._summary.duration_seconds += duration_seconds
        self._summary.languages[language or "unknown"] += 1
        if tar.tarstream.offset >= self._shard_bytes:
            self._close_shard()

    def leave_out(self, refusal: Refusal) -> None:
        """Count and name a sample that is not packed."""
        log.warning("left out: %s", refusal.reason)
        self._summary.left_out.append(refusal.reason)

    def finish(self) -> PackSummary:
        """Close the last shard, give all their final names, and write the index."""
        if not self._records:
            raise UserError(f"Nothing was packed into {self._out_dir}: no sample of the manifest could be used.")
        self._close_shard()
        for shard in self._shards:
            final = Path(shard.location)
            _temporary(final).replace(final)
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
        with written.open("rb") as shard:
            digest = hashlib.file_digest(shard, "sha256").hexdigest()
        contents = written.read_bytes()
        for number in range(self._first_record, len(self._records)):
            offset, num_blocks, duration_ms, _, *rest = self._records[number]
            start = offset * TAR_BLOCK_BYTES
            crc32 = zlib.crc32(contents[start : start + num_blocks * TAR_BLOCK_BYTES])
            self._records[number] = (offset, num_blocks, duration_ms, crc32, *rest)
        num_samples = len(self._records) - self._first_record
        self._shards.append(Shard(str(self._path), num_samples, written.stat().st_size, digest))

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
