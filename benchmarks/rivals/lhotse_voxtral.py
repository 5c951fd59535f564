"""lhotse: Shar with dynamic bucketing, and VoxtralProcessor.

The tars are converted to Shar, lhotse's own layout, with the audio as it is. Batches are filled up to a duration, the
mean duration times the batch size of the others. It resumes by the `state_dict` of its sampler, which goes through the
data again up to that place.
"""

from __future__ import annotations

import copy
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from lhotse import CutSet, Recording, SupervisionSegment
from lhotse.cut import MonoCut
from lhotse.dataset import DynamicBucketingSampler
from lhotse.shar import SharWriter
from numpy.typing import NDArray

from measure import CannotDoError, Place, answer
from voxtral_examples import SEED, SHUFFLE_BUFFER, Clip, VoxtralPath

NUM_BUCKETS = 10


class CutClip(Clip):
    """A clip whose audio lhotse decodes."""

    def __init__(self, cut: MonoCut) -> None:
        [supervision] = cut.supervisions
        super().__init__(cut.id, b"", supervision.text, supervision.language)
        object.__setattr__(self, "cut", cut)

    def waveform(self) -> NDArray[np.float32]:
        """The waveform, decoded by libsndfile through lhotse."""
        samples: NDArray[np.float32] = self.cut.load_audio()[0]
        return samples


class LhotsePath(VoxtralPath):
    """A bucketing sampler over Shar."""

    def prepare(self) -> dict[str, Any]:
        """Write the utterances of every tar as one shard of Shar."""
        folder = Path(self.request.prepared)
        for number, tar in enumerate(self.request.tars):
            part = folder / f"part-{number:06d}"
            part.mkdir()
            with SharWriter(part, fields={"recording": "original"}, shard_size=None) as writer:
                for cut in _cuts_of(tar):
                    writer.write(cut)
        return {}

    def open(self, place: Place) -> _Batches:
        """The batches of a rank."""
        folder = Path(self.request.prepared)
        fields = {
            "cuts": sorted(map(str, folder.glob("part-*/cuts*.jsonl.gz"))),
            "recording": sorted(map(str, folder.glob("part-*/recording*.tar"))),
        }
        cuts = CutSet.from_shar(fields=fields, shuffle_shards=True, seed=SEED)
        sampler = DynamicBucketingSampler(
            cuts.repeat() if place.repeats else cuts,
            max_duration=self.request.mean_seconds * self.request.batch_size,
            num_buckets=NUM_BUCKETS,
            shuffle=True,
            seed=SEED,
            buffer_size=SHUFFLE_BUFFER,
            num_cuts_for_bins_estimate=SHUFFLE_BUFFER,
            world_size=place.world_size,
            rank=place.rank,
        )
        if place.resumed_from is not None:
            states = place.resumed_from.states
            try:
                # It empties the dictionary that it is given.
                sampler.load_state_dict(copy.deepcopy(states[place.rank % len(states)]))
            except AssertionError as error:
                raise CannotDoError(str(error)) from error
        return _Batches(sampler)


class _Batches:
    def __init__(self, sampler: DynamicBucketingSampler) -> None:
        self._sampler = sampler

    def __iter__(self) -> Iterator[list[CutClip]]:
        return ([CutClip(cut) for cut in cuts] for cuts in self._sampler)

    def state(self) -> Any:
        """The library's own state."""
        return copy.deepcopy(self._sampler.state_dict())


def _cuts_of(tar_path: str) -> Iterator[MonoCut]:
    with tarfile.open(tar_path) as tar:
        members = {name: tar.extractfile(name) for name in tar.getnames()}
        for name in members:
            key, _, suffix = name.rpartition(".")
            if suffix == "json":
                yield _cut(key, members[f"{key}.flac"].read(), json.loads(members[name].read()))


def _cut(key: str, audio: bytes, fields: dict[str, Any]) -> MonoCut:
    recording = Recording.from_bytes(audio, recording_id=key)
    cut = recording.to_cut()
    cut.id = key
    cut.supervisions = [
        SupervisionSegment(
            id=key,
            recording_id=key,
            start=0.0,
            duration=recording.duration,
            text=fields["text"],
            language=fields["lang"],
        )
    ]
    return cut


if __name__ == "__main__":
    answer(LhotsePath)
