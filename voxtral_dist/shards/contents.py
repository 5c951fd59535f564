"""What the utterances of a shard set hold, which its index does not tell: every one is read and decoded."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.data.stored.audio import decode_pcm
from voxtral_dist.data.stored.checks import Cause, UnusableError, unusable_on_failure
from voxtral_dist.data.stored.index import ShardIndex, read_index
from voxtral_dist.shards.corpus.tar_utterances import tar_utterance
from voxtral_dist.shards.measures import SAMPLING_RATE
from voxtral_dist.shards.summary import UNKNOWN
from voxtral_dist.shards.tars.scan import parse_span
from voxtral_dist.shards.verification import RUN_LENGTH, opened
from voxtral_dist.shards.workers import ordered_map
from voxtral_dist.text.scripts import has_spaces_between_words
from voxtral_dist.text.steps import fold

Digests = NDArray[np.uint64]


@dataclass(frozen=True)
class SetContents:
    """The texts and the audio of a set's utterances as numbers, in the order of its index.

    num_words: of folded texts; 0 where words are not written apart, int32 `(N,)`. text_digests, audio_digests: of
    folded texts and of the samples at 16 kHz, uint64 `(N,)`; 0 where an utterance is unreadable. words: number of
    occurrences by language, of languages that write words apart. characters: of the texts as they are stored.
    unreadable: reasons by number of the utterance.
    """

    index: ShardIndex
    num_words: NDArray[np.int32]
    text_digests: Digests
    audio_digests: Digests
    words: dict[str, Counter[str]] = field(default_factory=dict)
    characters: Counter[str] = field(default_factory=Counter)
    unreadable: dict[int, str] = field(default_factory=dict)


@dataclass
class _Run:
    """The contents of neighbouring utterances from `first_id` on, as a worker returns them."""

    first_id: int
    num_words: list[int] = field(default_factory=list)
    text_digests: list[int] = field(default_factory=list)
    audio_digests: list[int] = field(default_factory=list)
    words: dict[str, Counter[str]] = field(default_factory=dict)
    characters: Counter[str] = field(default_factory=Counter)
    unreadable: dict[int, str] = field(default_factory=dict)

    def add(self, num_words: int, text_digest: int, audio_digest: int) -> None:
        self.num_words.append(num_words)
        self.text_digests.append(text_digest)
        self.audio_digests.append(audio_digest)


def read_contents(folder: str, num_workers: int, on_progress: Callable[[int], None] = lambda _: None) -> SetContents:
    """Read all utterances of a set in parallel: 20 bytes of memory an utterance, and its different words.

    Args:
        folder: of the set.
        num_workers: processes.
        on_progress: called with the number of utterances read.

    Raises:
        UserError: the folder holds no readable set.
        ReadError: a shard cannot be read at all, or the storage fails.
    """
    index = read_index([folder])
    contents = SetContents(
        index,
        num_words=np.zeros(len(index), dtype=np.int32),
        text_digests=np.zeros(len(index), dtype=np.uint64),
        audio_digests=np.zeros(len(index), dtype=np.uint64),
    )
    starts = range(0, len(index), RUN_LENGTH)
    for run in ordered_map(partial(_read_run, folder=folder), starts, num_workers, batch_size=1):
        end_id = run.first_id + len(run.num_words)
        contents.num_words[run.first_id : end_id] = run.num_words
        contents.text_digests[run.first_id : end_id] = run.text_digests
        contents.audio_digests[run.first_id : end_id] = run.audio_digests
        for language, words in run.words.items():
            contents.words.setdefault(language, Counter()).update(words)
        contents.characters.update(run.characters)
        contents.unreadable.update(run.unreadable)
        on_progress(end_id)
    return contents


def _read_run(first_id: int, folder: str) -> _Run:
    index, storage = opened(folder)
    ids = range(first_id, min(first_id + RUN_LENGTH, len(index)))
    storage.prefetch(index.span(utterance_id) for utterance_id in ids)
    run = _Run(first_id)
    for utterance_id in ids:
        span = index.span(utterance_id)
        try:
            with unusable_on_failure():
                contents = storage.read_indexed(span)
                if zlib.crc32(contents) != int(index.record(utterance_id)["crc32"]):
                    raise UnusableError(Cause.WRONG_INDEX, "has other bytes than when it was indexed")
                utterance = tar_utterance(parse_span(contents), span.location, index.layout(utterance_id))
                pcm = decode_pcm(utterance.audio.contents or b"", SAMPLING_RATE)
        except UnusableError as error:
            run.unreadable[utterance_id] = str(error)
            run.add(0, 0, 0)
            continue
        words = fold(utterance.text, utterance.language).split()
        run.characters.update(utterance.text)
        has_words = has_spaces_between_words(utterance.text, utterance.language)
        if has_words:
            run.words.setdefault(utterance.language or UNKNOWN, Counter()).update(words)
        # A text of marks alone has no words.
        same_text = " ".join(words) or utterance.text.strip()
        run.add(len(words) * has_words, _digest(same_text.encode()), _digest(pcm.tobytes()))
    return run


def _digest(contents: bytes) -> int:
    """64 bits, never 0: two of 100 million different contents are equal with a probability of 0.03 %."""
    return int.from_bytes(blake2b(contents, digest_size=8).digest(), "big") or 1
