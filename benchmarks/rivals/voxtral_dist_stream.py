"""voxtral-dist itself, measured by the same tasks as its rivals.

Samples are recognized by their audio, so that exactness is that of the batches and not of a plan: the checksum of a
window tells its key.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray

from voxtral_dist.config import TrainDataConfig
from voxtral_dist.data.examples.micro_batch import MicroBatch
from voxtral_dist.data.loader import TrainLoader, build_train_loader
from voxtral_dist.data.training_set import build_training_set
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.prompts import VoxtralPrompts

from measure import Place, Request, answer

SLOTS_PER_STEP = 4
# More than any measurement takes: a stream that does not end.
MANY_STEPS = 1_000_000


class OurPath:
    """The loader of `voxtral-dist train`."""

    def __init__(self, request: Request) -> None:
        torch.set_num_threads(1)
        self._request = request
        # A step of a rank is what `open` gives: at least one slot.
        self.examples_per_batch = request.batch_size * SLOTS_PER_STEP // request.world_size
        self._prompts = VoxtralPrompts.from_pretrained(request.model)
        self._log_mel = LogMel.from_pretrained(request.model, torch.device("cpu")) if request.with_features else None
        self._config = TrainDataConfig(
            shards=(request.shards,),
            slots_per_step=SLOTS_PER_STEP,
            max_examples=request.batch_size,
            num_workers=0,
        )

    def prepare(self) -> dict[str, Any]:
        """Convert nothing: the tars and their index are read as they are."""
        return {}

    def open(self, place: Place) -> _Stream:
        """The stream of a rank; its position is the number of the step."""
        first_step = 0 if place.resumed_from is None else place.resumed_from.states[0]
        num_steps = MANY_STEPS if place.repeats else self._steps_per_epoch
        loader = build_train_loader(self._config, self._prompts, 0, num_steps, place.rank, place.world_size)
        return _Stream(loader, first_step)

    def collate(self, batch: list[MicroBatch]) -> tuple[int, float]:
        """Count a step: the loader's batches are collated already; features are computed on request only."""
        if self._log_mel is not None:
            for micro_batch in batch:
                self._log_mel(micro_batch.pcm, micro_batch.windows_per_example)
        return sum(each.num_utterances for each in batch), sum(each.audio_seconds for each in batch)

    def keys(self, batch: list[MicroBatch]) -> list[str]:
        """Keys of a step's utterances, recognized by their audio."""
        known = self._keys_by_audio
        return [known[_checksum(window)] for each in batch if each.num_utterances for window in each.pcm.numpy()]

    @cached_property
    def _steps_per_epoch(self) -> int:
        return build_training_set(self._config, self._prompts, 0).plan.steps_per_epoch

    @cached_property
    def _keys_by_audio(self) -> dict[int, str]:
        return {_checksum(pcm): key for key, pcm in _stored(self._request.tars)}


class _Stream:
    def __init__(self, loader: TrainLoader, first_step: int) -> None:
        self._loader = loader
        self._step = first_step

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        for step in self._loader.starting_at(self._step):
            self._step = step.step + 1
            yield step.micro_batches

    def state(self) -> int:
        """Index of the next step."""
        return self._step


def _stored(tars: list[str]) -> Iterator[tuple[str, NDArray[np.int16]]]:
    for path in tars:
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.rpartition(".")
                if suffix != "json":
                    audio = tar.extractfile(member)
                    assert audio is not None
                    yield key, soundfile.read(io.BytesIO(audio.read()), dtype="int16")[0]


def _checksum(pcm: NDArray[np.int16]) -> int:
    """Checksum of the audio without the silence that fills its window."""
    return zlib.crc32(np.trim_zeros(pcm, "b").tobytes())


if __name__ == "__main__":
    answer(OurPath)
