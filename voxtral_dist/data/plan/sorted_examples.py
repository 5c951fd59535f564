"""The utterances of a megabatch as examples, sorted by what they cost the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.data.plan.cutting import Budget, cut_micro_batches
from voxtral_dist.data.plan.example_sizes import ExampleSizes, text_tokens
from voxtral_dist.data.plan.packing import pack_into_windows
from voxtral_dist.data.plan.permutation import hash_values
from voxtral_dist.data.plan.slot_examples import SlotExamples
from voxtral_dist.data.stored.index import ShardIndex
from voxtral_dist.data.stored.shard_set import Ids, Records

# A word after a space can take more tokens than at the start of a text: up to two more in Voxtral's vocabulary.
TOKENS_PER_JOINT = 3


@dataclass(frozen=True)
class SortedExamples:
    """`n` examples of `m` utterances, longest first.

    utterance_ids: the utterances of all examples, concatenated, `(m,)`.
    epochs: the epoch of its stream in which each utterance is drawn, `(m,)`.
    ends: where the utterances of each example end, `(n,)`.
    windows: encoder windows of each example, `(n,)`.
    positions: upper bound of the input positions of each example in the language model, `(n,)`.
    audio_ms: duration of all utterances together.
    window_ms: length of an encoder window.
    """

    utterance_ids: Ids
    epochs: Ids
    ends: NDArray[np.int64]
    windows: NDArray[np.int64]
    positions: NDArray[np.int64]
    audio_ms: int
    window_ms: int

    def cut(self, budget: Budget, num_cuts: int | None = None) -> list[slice]:
        """Cut the examples into micro-batches; see `cut_micro_batches`."""
        return cut_micro_batches(self.windows, self.positions, budget, num_cuts)

    def slot(self, run: slice) -> SlotExamples:
        """The examples of one micro-batch, given as a run of them."""
        first = int(self.ends[run.start - 1]) if run.start else 0
        utterances = slice(first, int(self.ends[run.stop - 1]))
        return SlotExamples(
            utterance_ids=tuple(self.utterance_ids[utterances].tolist()),
            epochs=tuple(self.epochs[utterances].tolist()),
            example_sizes=tuple(np.diff(self.ends[run], prepend=first).tolist()),
        )


def sort_examples(
    ids: Ids, epochs: Ids, index: ShardIndex, sizes: ExampleSizes, max_packed_tokens: int | None, key: Sequence[int]
) -> SortedExamples:
    """Make examples of utterances and sort them, longest first; ties are shuffled, so that streams mix.

    Args:
        ids: utterances, `(m,)`.
        epochs: the epoch of its stream in which each is drawn, `(m,)`.
        index: the index that holds their records.
        sizes: what examples cost.
        max_packed_tokens: maximum number of text tokens of a packed example; None packs nothing.
        key: integers that seed the shuffling.
    """
    # The epoch takes the upper bits: two draws of one utterance are not neighbours.
    order = np.argsort(hash_values(ids | epochs << 40, key), kind="stable")
    ids, epochs = ids[order], epochs[order]
    records = index.gather(ids)
    ends = np.arange(1, len(ids) + 1)
    if max_packed_tokens is not None:
        places, ends = _pack(records, ids, sizes, max_packed_tokens)
        ids, epochs, records = ids[places], epochs[places], records[places]
    counts = np.diff(ends, prepend=0)
    windows = sizes.windows(_sums(records["duration_ms"].astype(np.int64), ends))
    positions = sizes.positions(windows, _sums(text_tokens(records), ends) + TOKENS_PER_JOINT * (counts - 1))
    longest_first = np.argsort(-positions, kind="stable")
    utterances = _utterances_of(longest_first, ends, counts)
    return SortedExamples(
        utterance_ids=ids[utterances],
        epochs=epochs[utterances],
        ends=np.cumsum(counts[longest_first]),
        windows=windows[longest_first],
        positions=positions[longest_first],
        audio_ms=int(records["duration_ms"].sum(dtype=np.int64)),
        window_ms=sizes.window_ms,
    )


def _pack(
    records: Records, ids: Ids, sizes: ExampleSizes, max_packed_tokens: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The places of the utterances group by group, `(m,)`, and where each group ends, `(n,)`."""
    # An instruction is about the audio of one utterance, which therefore takes a whole window and stays alone.
    duration_ms = np.where(records["num_instruction_tokens"] > 0, sizes.window_ms, records["duration_ms"])
    groups = pack_into_windows(
        duration_ms.astype(np.int64),
        text_tokens(records) + TOKENS_PER_JOINT,
        records["language"],
        ids,
        sizes.window_ms,
        max_packed_tokens,
    )
    places = np.array([place for group in groups for place in group], dtype=np.int64)
    return places, np.array(list(accumulate(map(len, groups))), dtype=np.int64)


def _sums(values: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """The sum of the values of each example, `(n,)`."""
    totals = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(values)])
    return np.diff(totals[ends], prepend=0)


def _utterances_of(
    examples: NDArray[np.int64], ends: NDArray[np.int64], counts: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The places of the utterances of the given examples, concatenated in the order of `examples`."""
    chosen = counts[examples]
    first_of_chosen = np.cumsum(chosen) - chosen
    # A place is the start of its example plus the offset inside it.
    starts = np.repeat((ends - counts)[examples] - first_of_chosen, chosen)
    return np.asarray(starts + np.arange(len(starts)), dtype=np.int64)
