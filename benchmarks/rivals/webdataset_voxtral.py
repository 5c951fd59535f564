"""webdataset + soundfile + VoxtralProcessor.

webdataset stores no position. What its users do to resume is to build the same pipeline and to skip what was seen:
here before anything is decoded, and with seeded shuffles, which is the kindest way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import webdataset

from measure import Place, answer
from voxtral_examples import SEED, SHUFFLE_BUFFER, Clip, VoxtralPath, clip_of_members


class WebDatasetPath(VoxtralPath):
    """Stream with shards divided among ranks, shuffled shards, a shuffle buffer, and batches."""

    def open(self, place: Place) -> _Batches:
        """The batches of a rank; a resumed one skips its share of what all ranks have seen."""
        to_skip = 0
        if place.resumed_from is not None:
            seen = place.resumed_from.step * len(place.resumed_from.states) * self.request.batch_size
            to_skip = seen // place.world_size
        return _Batches(self._samples(place), to_skip, self.request.batch_size)

    def _samples(self, place: Place) -> Iterable[dict[str, Any]]:
        def shards_of_rank(shards: Iterable[Any]) -> Iterator[Any]:
            return islice(shards, place.rank, None, place.world_size)

        dataset = webdataset.WebDataset(
            self.request.tars,
            shardshuffle=len(self.request.tars),
            detshuffle=True,
            seed=SEED,
            nodesplitter=shards_of_rank,
            empty_check=False,
        ).compose(webdataset.detshuffle(SHUFFLE_BUFFER, seed=SEED))
        return dataset.repeat() if place.repeats else dataset


class _Batches:
    def __init__(self, samples: Iterable[dict[str, Any]], num_skipped: int, batch_size: int) -> None:
        self._samples = samples
        self._num_skipped = num_skipped
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[list[Clip]]:
        samples = islice(self._samples, self._num_skipped, None)
        while some := list(islice(samples, self._batch_size)):
            yield [clip_of_members(sample["__key__"], sample["flac"], sample["json"]) for sample in some]

    def state(self) -> None:
        """No state but the number of steps, which the trainer knows."""


if __name__ == "__main__":
    answer(WebDatasetPath)
