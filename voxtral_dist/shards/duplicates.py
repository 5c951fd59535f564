"""Utterances with the same text or the same audio, in one set and over several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

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
    _, starts, counts = np.unique(digests[order], return_index=True, return_counts=True)
    is_group = (counts > 1) & (digests[order][starts] != 0)
    starts, counts = starts[is_group], counts[is_group]
    by_size = np.lexsort((order[starts], -counts))[:num_named]
    largest = [tuple(order[starts[one] : starts[one] + counts[one]].tolist()) for one in by_size]
    return Duplicates(len(starts), int(counts.sum()), tuple(largest))


def num_with_other_texts(contents: SetContents) -> int:
    """Number of different audio contents that several utterances have with different texts."""
    is_read = contents.audio_digests != 0
    pairs = np.unique(np.stack([contents.audio_digests, contents.text_digests], axis=1)[is_read], axis=0)
    _, counts = np.unique(pairs[:, 0], return_counts=True)
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
