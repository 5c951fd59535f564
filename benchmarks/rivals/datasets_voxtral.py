"""Hugging Face `datasets`, streaming the tars with its WebDataset reader, and VoxtralProcessor.

Audio is decoded by soundfile from the bytes, because the library's own decoding needs torchcodec. It resumes by
`IterableDataset.state_dict` and `load_state_dict`; its documentation says that a shuffle buffer is not part of the
state.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import datasets
from datasets.distributed import split_dataset_by_node

from measure import CannotDoError, Place, answer
from voxtral_examples import SEED, SHUFFLE_BUFFER, Clip, VoxtralPath, clip_of_members

# Without these the reader takes FLAC for `Audio`, which cannot even pass on bytes without torchcodec.
FEATURES = datasets.Features(
    {
        "__key__": datasets.Value("string"),
        "__url__": datasets.Value("string"),
        "flac": datasets.Value("binary"),
        "json": {"text": datasets.Value("string"), "lang": datasets.Value("string")},
    }
)


class DatasetsPath(VoxtralPath):
    """Stream with shards divided among ranks, shuffled shards, a shuffle buffer, and batches."""

    def open(self, place: Place) -> _Batches:
        """The batches of a rank, from its own state."""
        stream = datasets.load_dataset(
            "webdataset", data_files={"train": self.request.tars}, split="train", streaming=True, features=FEATURES
        )
        stream = stream.shuffle(seed=SEED, buffer_size=SHUFFLE_BUFFER)
        stream = split_dataset_by_node(stream, rank=place.rank, world_size=place.world_size)
        if place.repeats:
            stream = stream.repeat(None)
        stream = stream.batch(self.request.batch_size)
        if place.resumed_from is not None:
            states = place.resumed_from.states
            if len(states) != place.world_size:
                raise CannotDoError(
                    "a state_dict is the position of one rank in its own shards; the documentation offers no way to "
                    "divide the states of some ranks among another number of ranks"
                )
            stream.load_state_dict(copy.deepcopy(states[place.rank]))
        return _Batches(stream)


class _Batches:
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[list[Clip]]:
        for batch in self._stream:
            columns = zip(batch["__key__"], batch["flac"], batch["json"], strict=True)
            yield [clip_of_members(key, audio, fields) for key, audio, fields in columns]

    def state(self) -> Any:
        """The library's own state."""
        return copy.deepcopy(self._stream.state_dict())


if __name__ == "__main__":
    answer(DatasetsPath)
