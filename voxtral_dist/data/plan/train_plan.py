"""The order of training as a pure function: which utterances make up which slot of which step.

    stream         the utterances of a shard set or of one language of it, permuted in blocks without a table of size N
    megabatch      the utterances of some steps: each stream contributes its share; they are packed (if configured) into
                   examples, which are sorted by cost
    micro-batch    a run of the sorted examples that keeps within the budget
    slot           the place of a micro-batch in its step: slots are shuffled inside the megabatch

`TrainPlan.slot(step, slot)` depends on (seed, index, configuration) alone: not on ranks, nodes or workers, and not on
earlier calls. So every rank computes its own part, the global batch is the same for any number of GPUs, and resuming
costs one megabatch at any step.

A megabatch has a fixed number of steps, and so of slots. The number of utterances that fit into these is estimated
once, from some megabatches of the plan itself. If a megabatch of unusually long utterances does not fit, some of its
steps get one more slot: the budget always holds.
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
from voxtral_dist.data.stored.shard_set import Ids
from voxtral_dist.errors import UserError
from voxtral_dist.output.counting import counted

# Incremented when equal utterances and configurations get another order.
PLAN_VERSION = 2
# About this many utterances are drawn to estimate how many fit into a step: each may be a read of a cold disk. Large
# megabatches are probed by smaller ones, which have the same costs on average.
_PROBED_UTTERANCES = 8192
_LARGEST_PROBE_UTTERANCES = 4096


@dataclass(frozen=True)
class PlanShape:
    """The settings that divide an epoch into steps; `TrainDataConfig` explains those of the same name.

    budget: limits of a micro-batch.
    max_packed_tokens: maximum number of text tokens of a packed example; None packs nothing.
    """

    slots_per_step: int
    budget: Budget
    megabatch_steps: int
    shuffle_block_size: int
    max_packed_tokens: int | None = None


@dataclass(frozen=True)
class PlanStatistics:
    """Expected properties of a micro-batch, measured on some megabatches of the plan.

    num_utterances, num_examples: mean number in a micro-batch.
    window_fill: fraction of the windows that is audio.
    token_fill: fraction of the language model's positions that is not padding.
    """

    num_utterances: float
    num_examples: float
    window_fill: float
    token_fill: float


class TrainPlan:
    """Draws every utterance of every stream once per epoch of the stream, in micro-batches of similar cost.

    `steps_per_epoch` is the number of steps of an epoch of the plan, and `statistics` describes its micro-batches.
    """

    def __init__(
        self, index: ShardIndex, streams: Streams, sizes: ExampleSizes, shape: PlanShape, key: Sequence[int]
    ) -> None:
        """Plan the streams of an index; `key` holds the integers that seed the order."""
        self._index = index
        self._streams = streams
        self._sizes = sizes
        self._shape = shape
        self._key = tuple(key)
        self._num_draws = sum(stream.num_draws for stream in streams.streams)
        if self._num_draws == 0:
            raise ValueError("a plan needs at least one utterance")
        self._megabatch = lru_cache(maxsize=2)(self._build_megabatch)
        # Only counts, but for many megabatches: data workers are several of them ahead of the current step.
        self._slots_of_megabatch = lru_cache(maxsize=4096)(self._count_slots)
        self.steps_per_epoch, self.statistics = self._measure()

    def num_slots(self, step: int) -> int:
        """The number of slots of a step: `slots_per_step`, or more where the budget demands it."""
        epoch_index, megabatch, step_of_megabatch = self._place(step)
        return self._slots_of_megabatch(epoch_index, megabatch)[step_of_megabatch]

    def slot(self, step: int, slot: int) -> SlotExamples:
        """The examples of a slot; none if the epoch has fewer examples than slots."""
        epoch_index, megabatch, step_of_megabatch = self._place(step)
        return self._megabatch(epoch_index, megabatch)[step_of_megabatch][slot]

    def _place(self, step: int) -> tuple[int, int, int]:
        """The epoch of a step, its megabatch in the epoch, and its place in the megabatch."""
        epoch_index, step_of_epoch = divmod(step, self.steps_per_epoch)
        # Megabatches are as equal as whole steps allow: megabatch m begins at step floor(m * steps / megabatches).
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
        """The slots of each step of a megabatch."""
        first, end = self._first_step(megabatch), self._first_step(megabatch + 1)
        drawn = self._draw(epoch_index, first, end, self.steps_per_epoch)
        num_slots = (end - first) * self._shape.slots_per_step
        micro_batches = [drawn.slot(examples) for examples in drawn.cut(self._shape.budget, num_slots)]
        micro_batches += [SlotExamples((), (), ())] * (num_slots - len(micro_batches))
        order = np.argsort(
            hash_values(np.arange(len(micro_batches)), (*self._key, epoch_index, megabatch, 1)), kind="stable"
        )
        shuffled = [micro_batches[place] for place in order.tolist()]
        # Micro-batches that exceed the number of slots go to the steps in turn.
        return [
            shuffled[step * self._shape.slots_per_step : (step + 1) * self._shape.slots_per_step]
            + shuffled[num_slots + step :: end - first]
            for step in range(end - first)
        ]

    def _draw(self, epoch_index: int, start: int, end: int, denominator: int) -> SortedExamples:
        """The draws of all streams between the points `start / denominator` and `end / denominator` of an epoch.

        Up to the fraction x of an epoch, a stream with D draws in it has contributed floor(D * x + constant). So its
        number of draws differs from its exact share by less than one, in each megabatch and in any run of them.
        """
        drawn = [
            self._draw_from(number, epoch_index, start, end, denominator)
            for number in range(len(self._streams.streams))
        ]
        ids, epochs = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
        key = (*self._key, epoch_index, start, 2)
        return sort_examples(ids, epochs, self._index, self._sizes, self._shape.max_packed_tokens, key)

    def _draw_from(self, number: int, epoch_index: int, start: int, end: int, denominator: int) -> tuple[Ids, Ids]:
        """The draws of one stream: utterances, and the epoch of the stream of each, both `(n,)`."""
        stream, num_streams = self._streams.streams[number], len(self._streams.streams)
        # The constants of streams differ, so that small streams do not all come at the end of an epoch.
        first, last = (
            epoch_index * stream.num_draws
            + (stream.num_draws * point * num_streams + number * denominator) // (denominator * num_streams)
            for point in (start, end)
        )
        stream_epochs, inside = np.divmod(np.arange(first, last), stream.num_utterances)
        ids = [np.zeros(0, dtype=np.int64)]
        for stream_epoch in np.unique(stream_epochs).tolist():
            positions = permute_blocks(
                inside[stream_epochs == stream_epoch],
                stream.num_utterances,
                self._shape.shuffle_block_size,
                (*self._key, number, stream_epoch),
            )
            ids.append(self._streams.utterance_ids(number, positions))
        return np.concatenate(ids), stream_epochs

    def _measure(self) -> tuple[int, PlanStatistics]:
        """The steps of an epoch and its statistics, from probes that are cut as tightly as the budget allows."""
        budget, slots = self._shape.budget, self._shape.slots_per_step
        first = self._draw(0, 0, min(_LARGEST_PROBE_UTTERANCES, self._num_draws), self._num_draws)
        per_cut = len(first.utterance_ids) / len(first.cut(budget))
        megabatch_utterances = max(1, round(per_cut * slots * self._shape.megabatch_steps))
        probe_utterances = min(self._num_draws, megabatch_utterances, _LARGEST_PROBE_UTTERANCES)
        num_probes = max(2, _PROBED_UTTERANCES // probe_utterances)
        starts = range(0, self._num_draws - probe_utterances + 1, probe_utterances)[:num_probes]
        probes = [self._draw(0, start, start + probe_utterances, self._num_draws) for start in starts]
        # An extra slot costs a whole round of all ranks, an unused slot one micro-batch. So one megabatch in `slots`
        # may be larger than planned: the newsvendor's quantile, for as many ranks as slots.
        room = float(np.quantile([len(probe.cut(budget)) for probe in probes], 1 - 1 / slots))
        num_steps = max(1, math.ceil(self._num_draws / probe_utterances * room / slots - 1e-6))
        return num_steps, _statistics(probes, num_steps * slots / self._num_draws * probe_utterances, budget)


def rank_slots(num_slots: int, rank: int, world_size: int) -> range:
    """The slots of a step that a rank computes."""
    return range(rank, num_slots, world_size)


def refuse_idle_ranks(slots_per_step: int, world_size: int) -> None:
    """Refuse more ranks than slots.

    Raises:
        UserError: some ranks would have nothing to compute.
    """
    if world_size > slots_per_step:
        raise UserError(
            f"`train_data.slots_per_step` is {slots_per_step}, but there are {counted(world_size, 'rank')}, and each "
            f"needs at least one slot: start at most {counted(slots_per_step, 'rank')}, or set it to {world_size} or "
            "more (this changes the global batch)."
        )


def _statistics(probes: Sequence[SortedExamples], num_cuts: float, budget: Budget) -> PlanStatistics:
    """The statistics of the probes, each cut into about `num_cuts` micro-batches."""
    cuts = [(probe, run) for probe in probes for run in probe.cut(budget, max(1, round(num_cuts)))]
    padded = sum(int(probe.positions[run].max()) * (run.stop - run.start) for probe, run in cuts)
    return PlanStatistics(
        num_utterances=sum(len(probe.utterance_ids) for probe in probes) / len(cuts),
        num_examples=sum(len(probe.ends) for probe in probes) / len(cuts),
        window_fill=sum(probe.audio_ms for probe in probes)
        / sum(int(probe.windows.sum()) * probe.window_ms for probe in probes),
        token_fill=sum(int(probe.positions.sum()) for probe in probes) / padded,
    )
