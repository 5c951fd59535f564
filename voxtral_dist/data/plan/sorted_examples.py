"""The samples of a sort window as examples, sorted by what the model pays for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from voxtral_dist.data.plan.cutting import Budget, cut_micro_batches
from voxtral_dist.data.plan.example_sizes import ExampleSizes, text_tokens
from voxtral_dist.data.plan.packing import pack_into_windows
from voxtral_dist.data.plan.permutation import hash_values
from voxtral_dist.data.plan.slot_examples import SlotExamples
from voxtral_dist.data.stored.index import ShardIndex
from voxtral_dist.data.stored.shard_set import Ids

# A word behind a space may take more tokens than at the start of a text: up to two more in Voxtral's vocabulary.
TOKENS_PER_JOINT = 3


@dataclass(frozen=True)
class SortedExamples:
    """Examples, longest first.

    utterance_ids, epochs: of the samples of all examples, one after the other. ends: where those of each example end.
    windows, positions: what each example costs the encoder and, at most, the language model. audio_ms: of all samples.
    """

    utterance_ids: Ids
    epochs: Ids
    ends: Ids
    windows: Ids
    positions: Ids
    audio_ms: int
    window_ms: int

    def cut(self, budget: Budget, num_cuts: int | None = None) -> list[slice]:
        """Micro-batches as runs of examples; see `cut_micro_batches`."""
        return cut_micro_batches(self.windows, self.positions, budget, num_cuts)

    def slot(self, run: slice) -> SlotExamples:
        """The samples of a run of examples."""
        first = int(self.ends[run.start - 1]) if run.start else 0
        samples = slice(first, int(self.ends[run.stop - 1]))
        return SlotExamples(
            utterance_ids=tuple(self.utterance_ids[samples].tolist()),
            epochs=tuple(self.epochs[samples].tolist()),
            example_sizes=tuple(np.diff(self.ends[run], prepend=first).tolist()),
        )


def sort_examples(
    ids: Ids, epochs: Ids, index: ShardIndex, sizes: ExampleSizes, max_packed_tokens: int | None, key: Sequence[int]
) -> SortedExamples:
    """Samples as examples, longest first; those of equal cost are shuffled, so that different streams mix.

    Args:
        ids: samples, `(n,)`.
        epochs: how often the stream of each was gone through before, `(n,)`.
        index: holds their records.
        sizes: what they cost.
        max_packed_tokens: how many text tokens packed examples have at most; None packs nothing.
        key: what the shuffling depends on.
    """
    # The pass takes the upper bits: two draws of one sample are not neighbours.
    order = np.argsort(hash_values(ids | epochs << 40, key), kind="stable")
    ids, epochs = ids[order], epochs[order]
    records = index.gather(ids)
    duration_ms, tokens = records["duration_ms"].astype(np.int64), text_tokens(records)
    if max_packed_tokens is None:
        ends = np.arange(1, len(ids) + 1)
    else:
        # An instruction is about one clip: such a sample fills its window alone.
        taken_ms = np.where(records["num_instruction_tokens"] > 0, sizes.window_ms, duration_ms)
        groups = pack_into_windows(
            taken_ms, tokens + TOKENS_PER_JOINT, records["language"], ids, sizes.window_ms, max_packed_tokens
        )
        grouped = np.array([place for group in groups for place in group], dtype=np.int64)
        ids, epochs, duration_ms, tokens = (values[grouped] for values in (ids, epochs, duration_ms, tokens))
        ends = np.array(list(accumulate(map(len, groups))), dtype=np.int64)
    counts = np.diff(ends, prepend=0)
    windows = sizes.windows(_sums(duration_ms, ends))
    positions = sizes.positions(windows, _sums(tokens, ends) + TOKENS_PER_JOINT * (counts - 1))
    longest_first = np.argsort(-positions, kind="stable")
    samples = _samples_of(longest_first, ends, counts)
    return SortedExamples(
        utterance_ids=ids[samples],
        epochs=epochs[samples],
        ends=np.cumsum(counts[longest_first]),
        windows=windows[longest_first],
        positions=positions[longest_first],
        audio_ms=int(duration_ms.sum()),
        window_ms=sizes.window_ms,
    )


def _sums(values: Ids, ends: Ids) -> Ids:
    """The sum of the values of each example, `(num_examples,)`."""
    totals = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(values)])
    return np.diff(totals[ends], prepend=0)


def _samples_of(examples: Ids, ends: Ids, counts: Ids) -> Ids:
    """The places of the samples of some examples, one example after the other."""
    chosen = counts[examples]
    first_of_chosen = np.cumsum(chosen) - chosen
    # Each place is the start of its example plus how far it is inside.
    starts = np.repeat((ends - counts)[examples] - first_of_chosen, chosen)
    return np.asarray(starts + np.arange(len(starts)), dtype=np.int64)
