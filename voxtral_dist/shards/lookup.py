"""One utterance of a shard set: found by its key, read, described, and its audio written to a file."""

from __future__ import annotations

import difflib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import soundfile

from voxtral_dist.data.stored.audio_source import opened_audio
from voxtral_dist.data.stored.checks import UnusableError
from voxtral_dist.data.stored.index import ShardIndex
from voxtral_dist.data.stored.storage import Span, Storage
from voxtral_dist.data.stored.tar_members import split_name
from voxtral_dist.errors import UserError, first_line
from voxtral_dist.output.counting import counted
from voxtral_dist.shards.corpus.tar_utterances import tar_utterance
from voxtral_dist.shards.corpus.utterances import Utterance
from voxtral_dist.shards.tars.scan import parse_span

_RUN_LENGTH = 256
# Enough for a long name, which takes an extended header of at least two blocks.
_HEADER_BYTES = 4096
# Comparing a wrong key with all keys of a large set takes minutes.
_MAX_COMPARED_KEYS = 20_000


def find_utterance(index: ShardIndex, key: str, storage: Storage) -> int:
    """The number of the utterance with a key, or of `#NUMBER`.

    The index holds no keys, so the headers of the tars are read.

    Raises:
        UserError: no utterance has the key; the message suggests similar keys.
    """
    if key.startswith("#"):
        return _numbered(index, key)
    seen: list[str] = []
    for utterance_id, found in _keys(index, storage):
        if found == key:
            return utterance_id
        if len(seen) < _MAX_COMPARED_KEYS:
            seen.append(found)
    near = difflib.get_close_matches(key, seen, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the first is {seen[0]}."
    raise UserError(f"None of {counted(len(index), 'utterance')} has the key {key!r}: {hint}")


def read_utterance(index: ShardIndex, utterance_id: int, storage: Storage) -> tuple[str, Utterance]:
    """The key of an utterance as stored in its tar, and the utterance.

    Raises:
        UserError: its bytes are damaged.
        ReadError: the shard cannot be read, or its storage fails.
    """
    span = index.span(utterance_id)
    try:
        group = parse_span(storage.read_indexed(span))
        return group.key, tar_utterance(group, span.location, index.layout(utterance_id))
    except (UnusableError, OSError) as error:
        raise UserError(
            f"The utterance #{utterance_id} at byte {span.offset} of {span.location} {first_line(error)}."
        ) from error


def utterance_lines(index: ShardIndex, utterance_id: int, key: str, utterance: Utterance) -> Iterator[str]:
    """An utterance as text, one line per field."""
    span = index.span(utterance_id)
    yield f"key        {key}"
    yield f"number     #{utterance_id}"
    if utterance.instruction is not None:
        yield f"instruction {utterance.instruction}"
    yield f"text       {utterance.text}"
    yield f"language   {utterance.language or 'unknown'}"
    yield f"duration   {int(index.record(utterance_id)['duration_ms']) / 1000:.3f} s"
    yield f"shard      {span.location}"
    yield f"bytes      {span.num_bytes} at {span.offset}"
    for name, value in utterance.extra.items():
        yield f"{name:<10} {value}"


def write_audio(utterance: Utterance, out: Path) -> Path:
    """Write the audio of an utterance to a file or into a folder, and return the path.

    Raises:
        UserError: the suffix is neither that of the stored audio nor .wav, or the file cannot be written.
    """
    stored = Path(utterance.audio.location).suffix.lower()
    contents = utterance.audio.contents or b""
    target = out / f"{utterance.key}{stored}" if out.is_dir() else out
    if target.suffix.lower() not in (stored, ".wav"):
        raise UserError(f"`--out` must end in {stored}, as the audio is stored, or in .wav, but is {out} instead.")
    try:
        if target.suffix.lower() == stored:
            target.write_bytes(contents)
        else:
            _write_wav(contents, target)
    except (OSError, UnusableError) as error:
        raise UserError(f"The audio cannot be written to {target}: {first_line(error)}.") from error
    return target


def _write_wav(contents: bytes, target: Path) -> None:
    """Write encoded audio as WAV of 16 bits, with its own rate and channels."""
    with opened_audio(io.BytesIO(contents)) as audio:
        rate, num_channels = audio.sampling_rate, audio.num_channels
        with soundfile.SoundFile(target, "w", rate, num_channels, "PCM_16", format="WAV") as file:
            for block in audio.blocks("int16"):
                file.write(block)


def _numbered(index: ShardIndex, key: str) -> int:
    if not key[1:].isdecimal() or int(key[1:]) >= len(index):
        raise UserError(f"The number of an utterance must be from #0 to #{len(index) - 1}, but is {key} instead.")
    return int(key[1:])


def _keys(index: ShardIndex, storage: Storage) -> Iterator[tuple[int, str]]:
    for first_id in range(0, len(index), _RUN_LENGTH):
        heads = {utterance_id: _head(index.span(utterance_id)) for utterance_id in _run(first_id, len(index))}
        storage.prefetch(heads.values())
        for utterance_id, head in heads.items():
            try:
                contents = storage.read_indexed(head)
            except OSError as error:
                raise UserError(f"The keys of the set cannot be read: {first_line(error)}.") from error
            yield utterance_id, _key(contents, utterance_id)


def _run(first_id: int, num_utterances: int) -> range:
    return range(first_id, min(first_id + _RUN_LENGTH, num_utterances))


def _head(span: Span) -> Span:
    return Span(span.location, span.offset, min(span.num_bytes, _HEADER_BYTES))


def _key(head: bytes, utterance_id: int) -> str:
    try:
        with tarfile.open(fileobj=io.BytesIO(head), mode="r:") as tar:
            first = tar.next()
    except Exception:
        first = None
    # A damaged utterance has no key to look up.
    return f"#{utterance_id}" if first is None else split_name(first.name)[0]
