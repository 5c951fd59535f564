"""Shard sets as a dataset of rows, like those of a `datasets.Dataset`: for notebooks, scripts and other trainers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypedDict

from voxtral_dist.data.examples.bad_utterance import BadUtterance, UtteranceError
from voxtral_dist.data.examples.reading import read_utterance
from voxtral_dist.data.stored.audio import AudioError, Waveform, decode_audio
from voxtral_dist.data.stored.index import read_index
from voxtral_dist.data.stored.storage import Storage


class AudioArray(TypedDict):
    """Decoded audio: float32 samples `(num_samples,)` in [-1, 1], and their rate in Hz."""

    array: Waveform
    sampling_rate: int


class ShardRow(TypedDict):
    """An utterance with decoded audio. The language is an ISO 639-1 code; None where it is not known."""

    key: str
    audio: AudioArray
    text: str
    language: str | None


class ShardDataset:
    """The utterances of shard sets by number, with decoded audio: a map-style dataset, as torch calls it.

    Audio is read and decoded per item, so that opening a set of any size takes no time. An item that cannot be read
    raises `UtteranceError`, and one whose storage fails `ReadError`.

    Example:
        >>> from voxtral_dist import ShardDataset
        >>> rows = ShardDataset("shards/speech")
        >>> len(rows)
        8
        >>> row = rows[0]
        >>> row["text"], row["language"], row["audio"]["sampling_rate"]
        ('seven green bottles 0', 'en', 16000)
        >>> for row in rows:
        ...     seconds = len(row["audio"]["array"]) / row["audio"]["sampling_rate"]
    """

    def __init__(self, *patterns: str, sampling_rate: int = 16_000, storage: Storage | None = None) -> None:
        """Open shard sets.

        Args:
            patterns: folders and URLs of shard sets; see `read_index`.
            sampling_rate: of the decoded audio, in Hz; audio of another rate is resampled.
            storage: what reads the bytes; None reads as the default configuration says.

        Raises:
            UserError: a pattern leads to no shard set.
        """
        self._storage = storage or Storage()
        self.index = read_index(patterns, self._storage)
        self._sampling_rate = sampling_rate

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, utterance_id: int) -> ShardRow:
        if not 0 <= utterance_id < len(self):
            raise IndexError(f"The dataset has no utterance {utterance_id}, only 0 to {len(self) - 1}.")
        stored = read_utterance(self.index, utterance_id, self._storage)
        try:
            array = decode_audio(stored.audio, self._sampling_rate)
        except AudioError as error:
            shard = self.index.shard(utterance_id).name
            raise UtteranceError(BadUtterance(shard, stored.key, str(error))) from error
        audio = AudioArray(array=array, sampling_rate=self._sampling_rate)
        return ShardRow(key=stored.key, audio=audio, text=stored.text, language=stored.language)

    def __iter__(self) -> Iterator[ShardRow]:
        return (self[utterance_id] for utterance_id in range(len(self)))
