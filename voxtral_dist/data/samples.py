"""One stored utterance: read from its shard, checked, and turned into the ids and windows of an example."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from typing import Any

import numpy as np

from voxtral_dist.data.audio import AudioError, Augmentation, Pcm, decode_audio, to_pcm
from voxtral_dist.data.index import TAR_BLOCK_BYTES, ShardIndex
from voxtral_dist.data.prompts import TranscriptionPrompts
from voxtral_dist.data.storage import read_span

# Encoders pad, and headers round: decoded audio may differ by this much from what the index says.
_DURATION_TOLERANCE_SECONDS = 0.1


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be used: where it is stored, and why."""

    shard: str
    key: str
    reason: str


class SampleError(Exception):
    """Carries a `BadSample` from where it was found to where it is counted."""

    def __init__(self, bad: BadSample) -> None:
        super().__init__(f"sample {bad.key!r} of {bad.shard} {bad.reason}")
        self.bad = bad


@dataclass(frozen=True)
class Sample:
    """One utterance as stored: encoded audio, and the fields of its json."""

    key: str
    audio: bytes
    fields: dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One utterance as the model takes it.

    pcm is `(num_windows, S)`, int16, padded with silence; `completion` ends with `</s>`.
    """

    sample_id: int
    key: str
    pcm: Pcm
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    reference: str
    duration_seconds: float


class SampleReader:
    """Reads samples of an index by number."""

    def __init__(self, index: ShardIndex, prompts: TranscriptionPrompts, max_target_tokens: int) -> None:
        self._index = index
        self._prompts = prompts
        self._max_target_tokens = max_target_tokens

    def read(self, sample_id: int) -> Sample:
        """The stored utterance.

        Raises:
            SampleError: the bytes cannot be read, or are not the tar members of one sample with audio and json.
        """
        span = self._index.span(sample_id)
        try:
            return parse_members(read_span(span))
        except (OSError, tarfile.TarError, ValueError) as error:
            reason = f"cannot be read at byte {span.offset}: {error}"
            raise SampleError(BadSample(span.path.name, f"#{sample_id}", reason)) from error

    def example(self, sample_id: int, augmentation: Augmentation | None = None, key: tuple[int, ...] = ()) -> Example:
        """The utterance as token ids and windows; `key` makes augmentation reproducible.

        Raises:
            SampleError: anything about the sample is unusable; the reason says what.
        """
        sample = self.read(sample_id)
        try:
            return self._example(sample_id, sample, augmentation, key)
        except (AudioError, ValueError) as error:
            shard = self._index.span(sample_id).path.name
            raise SampleError(BadSample(shard, sample.key, str(error))) from error

    def _example(
        self, sample_id: int, sample: Sample, augmentation: Augmentation | None, key: tuple[int, ...]
    ) -> Example:
        text = sample.fields.get("text")
        if not isinstance(text, str) or not text.strip():
            raise ValueError("has no text")
        language = sample.fields.get("lang")
        if language is not None and not isinstance(language, str):
            raise ValueError(f"has the language {language!r}, which is not text")
        completion = self._prompts.completion(text)
        if len(completion) > self._max_target_tokens:
            raise ValueError(f"has {len(completion)} target tokens, more than the limit of {self._max_target_tokens}")
        waveform = decode_audio(sample.audio, self._prompts.sampling_rate)
        self._check_duration(sample_id, len(waveform) / self._prompts.sampling_rate)
        if augmentation is not None:
            waveform = augmentation(waveform, self._prompts.sampling_rate, (*key, sample_id))
        num_windows = self._prompts.num_windows(len(waveform))
        return Example(
            sample_id=sample_id,
            key=sample.key,
            pcm=pad_to_windows(to_pcm(waveform), self._prompts.window_samples),
            prompt=self._prompts.prompt(language, num_windows),
            completion=tuple(completion),
            reference=text,
            duration_seconds=len(waveform) / self._prompts.sampling_rate,
        )

    def _check_duration(self, sample_id: int, seconds: float) -> None:
        # Truncated mp3 and wav decode short without an error.
        expected = float(self._index.records[sample_id]["duration_ms"]) / 1000.0
        if abs(seconds - expected) > _DURATION_TOLERANCE_SECONDS + 0.01 * expected:
            raise ValueError(f"decodes to {seconds:.2f} s of audio, but its index says {expected:.2f} s")


def pad_to_windows(pcm: Pcm, window_samples: int) -> Pcm:
    """`(num_samples,)` -> `(num_windows, window_samples)`, with silence behind the audio."""
    padding = -len(pcm) % window_samples
    return np.pad(pcm, (0, padding)).reshape(-1, window_samples)


def parse_members(contents: bytes) -> Sample:
    """The sample in a run of tar members: `KEY.json` and `KEY.<audio format>`.

    Raises:
        ValueError: a member is missing, or the json is not a mapping.
        tarfile.TarError: these bytes are not tar members.
    """
    members: dict[str, bytes] = {}
    key = ""
    with tarfile.open(fileobj=io.BytesIO(contents + bytes(2 * TAR_BLOCK_BYTES)), mode="r:") as tar:
        for member in tar:
            key, _, suffix = member.name.rpartition(".")
            extracted = tar.extractfile(member)
            if extracted is not None:
                members[suffix] = extracted.read()
    fields = json.loads(members.pop("json", b"null"))
    if not isinstance(fields, dict):
        raise ValueError("has no json member with its text")
    if len(members) != 1:
        raise ValueError(f"must have one audio member, but has {sorted(members)} instead")
    return Sample(key, members.popitem()[1], fields)
