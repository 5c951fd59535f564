"""The order of training as a pure function: which samples make up which slot of which step.

    stream         the samples of a shard set or of one language of it, permuted block by block without a table of N
    sort window    some steps: each stream gives its share of samples; they are packed (where wanted) and sorted by cost
    micro-batch    a run of that order, cut within the budgets
    slot           the place of a micro-batch in its step: shuffled inside the window

`TrainPlan.slot(step, slot)` depends on (seed, index, configuration) alone: not on ranks, nodes, workers, or on what was
asked before. So every rank computes its own part, the global batch is the same for any number of GPUs, and resuming
costs one sort window wherever the run stood.

A sort window has a fixed number of steps, and so of slots. How many samples these take is estimated once from some
windows of the plan itself. Where a window of unusually long samples does not fit into its slots, some of its steps get
a slot more: budgets always hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from voxtral_dist.data.plan.cutting import Budget
from voxtral_dist.data.plan.example_sizes import ExampleSizes
from voxtral_dist.data.plan.permutation import hash_values, permute_blocks
from voxtral_dist.data.plan.slot_examples import SlotExamples
from voxtral_dist.data.plan.sorted_examples import SortedExamples, sort_examples
from voxtral_dist.data.plan.streams import Streams
from voxtral_dist.data.stored.index import ShardIndex
from voxtral_dist.errors import UserError

# Changes when equal samples and configurations give another order.
PLAN_VERSION = 2
# The estimate of what a window takes is made of so many samples or a few more: each may be a read of a cold disk. Large
# windows are probed by smaller ones, which have the same costs on the average.
_PROBED_UTTERANCES = 8192
_LARGEST_PROBE_UTTERANCES = 4096


@dataclass(frozen=True)
class PlanShape:
    """The numbers that cut a pass into steps: see `TrainDataConfig` for their meaning.

    max_packed_tokens: transcripts that are packed into one example have at most so many tokens; None packs nothing.
    """

    slots_per_step: int
    budget: Budget
    megabatch_steps: int
    shuffle_block_size: int
    max_packed_tokens: int | None = None


@dataclass(frozen=True)
class PlanStatistics:
    """What the plan expects of micro-batches, measured on some windows of it.

    window_fill: audio over the length of the windows that it is in. token_fill: positions of the language model that
    are not padding.
    """

    num_utterances: float
    num_examples: float
    window_fill: float
    token_fill: float


class TrainPlan:
    """Every sample of every stream once per pass of the stream, in micro-batches of similar cost."""

    def __init__(
        self, index: ShardIndex, streams: Streams, sizes: ExampleSizes, shape: PlanShape, key: Sequence[int]
    ) -> None:
        """A plan over the streams of an index; `key` holds integers that the order depends on, such as the seed."""
        self._index = index
        self._streams = streams
        self._sizes = sizes
        self._shape = shape
        self._key = tuple(key)
        self._num_draws = sum(stream.num_draws for stream in streams.streams)
        if self._num_draws == 0:
            raise ValueError("a plan needs at least one sample")
        self._megabatch = lru_cache(maxsize=2)(self._build_megabatch)
        # Numbers only, and many of them: workers run ahead of the step that is asked about by several windows.
        self._slots_of_megabatch = lru_cache(maxsize=4096)(self._count_slots)
        self.steps_per_epoch, self.statistics = self._measure()

    def num_slots(self, step: int) -> int:
        """Of a step: `slots_per_step`, or more where the budgets demand it."""
        epoch_index, megabatch, step_of_megabatch = self._place(step)
        return self._slots_of_megabatch(epoch_index, megabatch)[step_of_megabatch]

    def slot(self, step: int, slot: int) -> SlotExamples:
        """The examples of a slot: none where a pass has fewer examples than slots."""
        epoch_index, megabatch, step_of_megabatch = self._place(step)
        return self._megabatch(epoch_index, megabatch)[step_of_megabatch][slot]

    def _place(self, step: int) -> tuple[int, int, int]:
        """The pass of a step, its window in the pass, and its place in the window."""
        epoch_index, step_of_epoch = divmod(step, self.steps_per_epoch)
        # The windows of a pass are as equal as whole steps allow: window w begins at step floor(w * steps / windows).
        megabatch = ((step_of_epoch + 1) * self._num_megabatches - 1) // self.steps_per_epoch
        return epoch_index, megabatch, step_of_epoch - self._first_step(megabatch)

    def _count_slots(self, epoch_index: int, megabatch: int) -> tuple[int, ...]:
        return tuple(len(slots) for slots in self._megabatch(epoch_index, megabatch))

    @property
    def _num_megabatches(self) -> int:
        return -(-self.steps_per_epoch // self._shape.megabatch_steps)

    def _first_step(self, megabatch: int) -> int:
        return megabatch * self.steps_per_epoch // self._num_megabatches

    def _build_megabatch(self, epoch_index: int, megabatch: int) -> list[list[SlotExamples]]:
        """The slots of each step of a window."""
        first, end = self._first_step(megabatch), self._first_step(megabatch + 1)
        drawn = self._draw(epoch_index, first, end, self.steps_per_epoch)
        num_slots = (end - first) * self._shape.slots_per_step
        micro_batches = [drawn.slot(examples) for examples in drawn.cut(self._shape.budget, num_slots)]
        micro_batches += [SlotExamples((), (), ())] * (num_slots - len(micro_batches))
        order = np.argsort(
            hash_values(np.arange(len(micro_batches)), (*self._key, epoch_index, megabatch, 1)), kind="stable"
        )
        shuffled = [micro_batches[place] for place in order.tolist()]
        # More micro-batches than slots: what is over goes to the steps in turn.
        return [
            shuffled[step * self._shape.slots_per_step : (step + 1) * self._shape.slots_per_step]
            + shuffled[num_slots + step :: end - first]
            for step in range(end - first)
        ]

    def _draw(self, epoch_index: int, start: int, end: int, denominator: int) -> SortedExamples:
        """What all streams give between two points of a pass, which are fractions `start / denominator` of it.

        A stream with D draws in a pass has given floor(D * point + constant) at a point. So its number in a window
        differs from its exact share by less than one sample, in each window and in any number of them together.
        """
        ids, epochs = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        num_streams = len(self._streams.streams)
        for number, stream in enumerate(self._streams.streams):
            # Streams round at different points, so that small ones do not all come at the end of a pass.
            first, last = (
                epoch_index * stream.num_draws
                + (stream.num_draws * point * num_streams + number * denominator) // (denominator * num_streams)
                for point in (start, end)
            )
            stream_epochs, inside = np.divmod(np.arange(first, last), stream.num_utterances)
            for stream_epoch in np.unique(stream_epochs).tolist():
                places = permute_blocks(
                    inside[stream_epochs == stream_epoch],
                    stream.num_utterances,
                    self._shape.shuffle_block_size,
                    (*self._key, number, stream_epoch),
                )
                ids.append(self._streams.utterance_ids(number, places))
            epochs.append(stream_epochs)
        key = (*self._key, epoch_index, start, 2)
        packed = self._shape.max_packed_tokens
        return sort_examples(np.concatenate(ids), np.concatenate(epochs), self._index, self._sizes, packed, key)

    def _measure(self) -> tuple[int, PlanStatistics]:
        """How many steps a pass takes, from windows that are cut as tightly as the budget allows."""
        budget, slots = self._shape.budget, self._shape.slots_per_step
        first = self._draw(0, 0, min(_LARGEST_PROBE_UTTERANCES, self._num_draws), self._num_draws)
        per_cut = len(first.utterance_ids) / len(first.cut(budget))
        megabatch_utterances = max(1, round(per_cut * slots * self._shape.megabatch_steps))
        probe_utterances = min(self._num_draws, megabatch_utterances, _LARGEST_PROBE_UTTERANCES)
        num_probes = max(2, _PROBED_UTTERANCES // probe_utterances)
        starts = range(0, self._num_draws - probe_utterances + 1, probe_utterances)[:num_probes]
        probes = [self._draw(0, start, start + probe_utterances, self._num_draws) for start in starts]
        # A slot more than planned costs a whole round of all ranks, a slot too many one micro-batch: so of all windows
        # one in `slots` may be larger than planned (the newsvendor's quantile, for as many ranks as slots).
        room = float(np.quantile([len(probe.cut(budget)) for probe in probes], 1 - 1 / slots))
        num_steps = max(1, math.ceil(self._num_draws / probe_utterances * room / slots - 1e-6))
        return num_steps, _statistics(probes, num_steps * slots / self._num_draws * probe_utterances, budget)


def rank_slots(num_slots: int, rank: int, world_size: int) -> range:
    """The slots of a step that a rank runs."""
    return range(rank, num_slots, world_size)


def refuse_idle_ranks(slots_per_step: int, world_size: int) -> None:
    """Refuse more ranks than slots.

    Raises:
        UserError: some ranks would have nothing to do.
    """
    if world_size > slots_per_step:
        raise UserError(
            f"`train_data.slots_per_step` is {slots_per_step}, but {world_size} ranks were started and each needs at "
            f"least one slot: start at most {slots_per_step} ranks, or set it to {world_size} or more (this changes "
            "the global batch)."
        )


def _statistics(probes: Sequence[SortedExamples], num_cuts: float, budget: Budget) -> PlanStatistics:
    """Of the probes, when each is cut into so many micro-batches."""
    cuts = [(probe, run) for probe in probes for run in probe.cut(budget, max(1, round(num_cuts)))]
    padded = sum(int(probe.positions[run].max()) * (run.stop - run.start) for probe, run in cuts)
    return PlanStatistics(
        num_utterances=sum(len(probe.utterance_ids) for probe in probes) / len(cuts),
        num_examples=sum(len(probe.ends) for probe in probes) / len(cuts),
        window_fill=sum(probe.audio_ms for probe in probes)
        / sum(int(probe.windows.sum()) * probe.window_ms for probe in probes),
        token_fill=sum(int(probe.positions.sum()) for probe in probes) / padded,
    )
