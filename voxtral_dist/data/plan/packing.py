"""Packing of short utterances into shared encoder windows."""

from __future__ import annotations

import bisect

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.data.stored.shard_set import Ids

# Open groups tried for an utterance before a new group is opened: all of them may have room for its audio, but none
# for its text.
_NUM_CANDIDATES = 32


def pack_into_windows(
    duration_ms: NDArray[np.int64],
    num_tokens: NDArray[np.int64],
    languages: NDArray[np.uint16],
    utterance_ids: Ids,
    window_ms: int,
    max_tokens: int,
) -> list[list[int]]:
    """Group utterances so that the audio of a group fits into one window and its text into one target.

    Best-fit decreasing bin packing (Johnson, "Near-optimal bin packing algorithms", MIT 1973): the longest utterances
    come first, and each goes where it leaves the least room. Utterances of different languages never share a group,
    nor do two draws of one utterance; an utterance longer than a window stays alone.

    Args:
        duration_ms: duration of each utterance in milliseconds, `(n,)`.
        num_tokens: text tokens of each, `(n,)`.
        languages: language number of each, `(n,)`.
        utterance_ids: id of each, `(n,)`.
        window_ms: length of a window in milliseconds.
        max_tokens: maximum number of text tokens of a group of several utterances.

    Returns:
        Groups of positions in the arrays, in no particular order; each position is in exactly one group, and the
        positions of a group ascend.
    """
    groups: list[list[int]] = []
    tokens: list[int] = []
    held: list[set[int]] = []
    # By language: (room left, group), ascending.
    open_groups: dict[int, list[tuple[int, int]]] = {}
    utterances = list(
        zip(duration_ms.tolist(), num_tokens.tolist(), languages.tolist(), utterance_ids.tolist(), strict=True)
    )
    for position in np.argsort(-duration_ms, kind="stable").tolist():
        duration, length, language, utterance_id = utterances[position]
        rooms = open_groups.setdefault(language, [])
        tightest = bisect.bisect_left(rooms, (duration, -1))
        place = next(
            (
                place
                for place in range(tightest, min(tightest + _NUM_CANDIDATES, len(rooms)))
                if tokens[rooms[place][1]] + length <= max_tokens and utterance_id not in held[rooms[place][1]]
            ),
            None,
        )
        if duration < window_ms and place is not None:
            room, group = rooms.pop(place)
        else:
            room, group = window_ms, len(groups)
            groups.append([])
            tokens.append(0)
            held.append(set())
        groups[group].append(position)
        held[group].add(utterance_id)
        tokens[group] += length
        if room > duration:
            bisect.insort(rooms, (room - duration, group))
    return [sorted(group) for group in groups]
