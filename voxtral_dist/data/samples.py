"""One stored utterance: read from its shard, checked, and turned into the ids and windows of an example."""

from __future__ import annotations

import tarfile
import zlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.data.audio import AudioError, Pcm, decode_audio, to_pcm
from voxtral_dist.data.augmentation import Augmentation
from voxtral_dist.data.index import ShardIndex
from voxtral_dist.data.members import Sample, parse_sample
from voxtral_dist.data.prompts import TranscriptionPrompts
from voxtral_dist.data.storage import Storage

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
class Example:
    """One utterance as the model takes it.

    pcm is `(num_windows, S)`, int16, padded with silence; `completion` ends with `</s>`. feature_masks are those of
    `draw_feature_masks`, and none in evaluations.
    """

    sample_id: int
    key: str
    pcm: Pcm
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    reference: str
    duration_seconds: float
    feature_masks: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 4), dtype=np.int64))


class SampleReader:
    """Reads samples of an index by number."""

    def __init__(self, index: ShardIndex, prompts: TranscriptionPrompts, max_target_tokens: int) -> None:
        self._index = index
        self._prompts = prompts
        self._max_target_tokens = max_target_tokens
        self._storage = Storage()

    def read(self, sample_id: int) -> Sample:
        """The stored utterance.

        Raises:
            SampleError: the bytes cannot be read, or are not the tar members of one sample with audio and json.
        """
        span = self._index.span(sample_id)
        try:
            contents = self._storage.read(span)
            if zlib.crc32(contents) != int(self._index.record(sample_id)["crc32"]):
                raise ValueError("its bytes are not those that were indexed (the checksum differs)")
            return parse_sample(contents, self._index.members(sample_id))
        except (OSError, tarfile.TarError, ValueError) as error:
            reason = f"cannot be read at byte {span.offset}: {error}"
            raise SampleError(BadSample(self._index.shard(sample_id).name, f"#{sample_id}", reason)) from error

    def example(self, sample_id: int, augmentation: Augmentation | None = None, key: tuple[int, ...] = ()) -> Example:
        """The utterance as token ids and windows; `key` makes augmentation reproducible.

        Raises:
            SampleError: anything about the sample is unusable; the reason says what.
        """
        sample = self.read(sample_id)
        try:
            return self._example(sample_id, sample, augmentation, key)
        except (AudioError, ValueError) as error:
            shard = self._index.shard(sample_id).name
            raise SampleError(BadSample(shard, sample.key, str(error))) from error

    def _example(
        self, sample_id: int, sample: Sample, augmentation: Augmentation | None, key: tuple[int, ...]
    ) -> Example:
        completion = self._prompts.completion(sample.text)
        if len(completion) > self._max_target_tokens:
            raise ValueError(f"has {len(completion)} target tokens, more than the limit of {self._max_target_tokens}")
        waveform = decode_audio(sample.audio, self._prompts.sampling_rate)
        self._check_duration(sample_id, len(waveform) / self._prompts.sampling_rate)
        if augmentation is not None:
            max_samples = self._prompts.num_windows(len(waveform)) * self._prompts.window_samples
            waveform = augmentation(waveform, self._prompts.sampling_rate, (*key, sample_id), max_samples)
        num_windows = self._prompts.num_windows(len(waveform))
        return Example(
            sample_id=sample_id,
            key=sample.key,
            pcm=pad_to_windows(to_pcm(waveform), self._prompts.window_samples),
            prompt=self._prompts.prompt(sample.language, num_windows),
            completion=tuple(completion),
            reference=sample.text,
            duration_seconds=len(waveform) / self._prompts.sampling_rate,
        )

    def _check_duration(self, sample_id: int, seconds: float) -> None:
        # Truncated mp3 and wav decode short without an error.
        expected = float(self._index.record(sample_id)["duration_ms"]) / 1000.0
        if abs(seconds - expected) > _DURATION_TOLERANCE_SECONDS + 0.01 * expected:
            raise ValueError(f"decodes to {seconds:.2f} s of audio, but its index says {expected:.2f} s")


def pad_to_windows(pcm: Pcm, window_samples: int) -> Pcm:
    """`(num_samples,)` -> `(num_windows, window_samples)`, with silence behind the audio."""
    padding = -len(pcm) % window_samples
    return np.pad(pcm, (0, padding)).reshape(-1, window_samples)
