"""Short utterances packed together into windows."""

from __future__ import annotations

import bisect

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.data.stored.shard_set import Ids

# Of groups with room for a clip, so many are looked at before a new one is opened: all of them may be full of text.
_NUM_CANDIDATES = 32


def pack_into_windows(
    duration_ms: NDArray[np.int64],
    num_tokens: NDArray[np.int64],
    languages: NDArray[np.uint16],
    utterance_ids: Ids,
    window_ms: int,
    max_tokens: int,
) -> list[list[int]]:
    """Groups of positions whose audio fits into one window and whose transcripts fit into one target.

    Best fit, longest first (Johnson, "Near-optimal bin packing algorithms", MIT 1973): each clip goes where it leaves
    the least room. Clips of different languages are never joined, nor two draws of one sample, and clips of more than a
    window stay alone.

    Returns:
        Groups in no particular order; the positions of a group ascend. Every position is in one group.
    """
    groups: list[list[int]] = []
    tokens: list[int] = []
    held: list[set[int]] = []
    # By language: (room left, group), ascending.
    open_groups: dict[int, list[tuple[int, int]]] = {}
    clips = list(
        zip(duration_ms.tolist(), num_tokens.tolist(), languages.tolist(), utterance_ids.tolist(), strict=True)
    )
    for position in np.argsort(-duration_ms, kind="stable").tolist():
        duration, length, language, utterance_id = clips[position]
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
