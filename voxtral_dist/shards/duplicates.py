"""Utterances with the same text or the same audio, in one set and over several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.shards.contents import Digests, SetContents


@dataclass(frozen=True)
class Duplicates:
    """Utterances of a set that are equal to others of it.

    num_contents: different contents that several utterances have. num_utterances: utterances that have them. largest:
    numbers of the utterances of each group, the largest group first.
    """

    num_contents: int
    num_utterances: int
    largest: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class SharedAudio:
    """Utterances of two sets with the same audio: their number in the second set, and the first pairs of numbers."""

    first: str
    second: str
    num_utterances: int
    pairs: tuple[tuple[int, int], ...]


def duplicates(digests: Digests, num_named: int) -> Duplicates:
    """The groups of equal digests; 0 is no digest.

    Args:
        digests: uint64 `(N,)`.
        num_named: how many groups are listed.
    """
    order = np.argsort(digests, kind="stable")
    starts, counts = _groups(digests[order])
    is_group = (counts > 1) & (digests[order][starts] != 0)
    starts, counts = starts[is_group], counts[is_group]
    by_size = np.lexsort((order[starts], -counts))[:num_named]
    largest = [tuple(order[starts[one] : starts[one] + counts[one]].tolist()) for one in by_size]
    return Duplicates(len(starts), int(counts.sum()), tuple(largest))


def num_with_other_texts(contents: SetContents) -> int:
    """Number of different audio contents that several utterances have with different texts."""
    is_read = contents.audio_digests != 0
    pairs = np.unique(np.stack([contents.audio_digests, contents.text_digests], axis=1)[is_read], axis=0)
    _, counts = _groups(pairs[:, 0])
    return int((counts > 1).sum())


def shared_audio(sets: Mapping[str, SetContents], num_named: int) -> list[SharedAudio]:
    """The audio that each two sets share, such as a training set and a test set."""
    names = list(sets)
    found = []
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            one, other = sets[first].audio_digests, sets[second].audio_digests
            theirs = np.flatnonzero(np.isin(other, one[one != 0]))
            if len(theirs):
                pairs = [(int(np.flatnonzero(one == other[number])[0]), int(number)) for number in theirs[:num_named]]
                found.append(SharedAudio(first, second, len(theirs), tuple(pairs)))
    return found


def _groups(ordered: Digests) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First places and lengths of the runs of equal values."""
    if not len(ordered):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    return starts, np.diff(np.concatenate((starts, [len(ordered)])))
