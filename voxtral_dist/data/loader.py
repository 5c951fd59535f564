"""The micro-batches of one rank, step by step, from any step on.

Workers hold no state: the stream is a map over (step, slot), so any number of workers gives the same one, and the place
to resume from is the number of the step.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from voxtral_dist.config import TrainDataConfig
from voxtral_dist.data.augmentation import Augmentation, check_spec_augment, draw_feature_masks
from voxtral_dist.data.batches import MicroBatch, collate, weightless_micro_batch
from voxtral_dist.data.index import ShardIndex, read_index
from voxtral_dist.data.plan import PlanShape, TrainPlan, rank_slots
from voxtral_dist.data.prompts import TranscriptionPrompts
from voxtral_dist.data.samples import BadSample, Example, SampleError, SampleReader
from voxtral_dist.errors import UserError

# A place in the stream: (step, slot); slot None asks for a micro-batch of weight zero.
Place = tuple[int, int | None]


@dataclass(frozen=True)
class StepBatches:
    """What one rank runs in one step: as many micro-batches as every other rank."""

    step: int
    micro_batches: list[MicroBatch]


class TrainLoader:
    """The stream of one rank."""

    def __init__(
        self, dataset: _SlotDataset, slots_per_step: int, rank: int, world_size: int, num_workers: int, num_steps: int
    ) -> None:
        self._dataset = dataset
        self._slots: list[int | None] = list(rank_slots(slots_per_step, rank, world_size))
        self._per_step = -(-slots_per_step // world_size)
        # A rank that has a slot less than others runs a micro-batch of weight zero in its place.
        self._slots += [None] * (self._per_step - len(self._slots))
        self._num_workers = num_workers
        self._num_steps = num_steps
        self.num_samples = dataset.num_samples
        self.num_drawn = dataset.num_drawn
        self.fingerprint = dataset.fingerprint

    def starting_at(self, first_step: int) -> Iterator[StepBatches]:
        """The steps from `first_step` to the end of the run."""
        stream = DataLoader(
            self._dataset,
            sampler=_Places(range(first_step, self._num_steps), self._slots),
            batch_size=None,
            num_workers=self._num_workers,
            worker_init_fn=_ignore_stop_signals,
            prefetch_factor=2 * self._per_step if self._num_workers else None,
        )
        batches = iter(stream)
        for step in range(first_step, self._num_steps):
            yield StepBatches(step, [next(batches) for _ in self._slots])


def build_train_loader(
    config: TrainDataConfig, prompts: TranscriptionPrompts, seed: int, num_steps: int, rank: int, world_size: int
) -> TrainLoader:
    """The stream of one rank of `world_size`.

    Raises:
        UserError: shards are missing, no sample passes the filters, or there are more ranks than slots.
    """
    rank_slots(config.slots_per_step, rank, world_size)
    index = read_index(config.shards)
    plan = build_plan(config, index, prompts, seed)
    dataset = _SlotDataset(index, plan, prompts, config, seed)
    return TrainLoader(dataset, config.slots_per_step, rank, world_size, config.num_workers, num_steps)


def build_plan(config: TrainDataConfig, index: ShardIndex, prompts: TranscriptionPrompts, seed: int) -> TrainPlan:
    """The order of training, the same on every rank."""
    shape = PlanShape(
        config.slots_per_step, config.examples_per_slot, config.sort_window_steps, config.shuffle_block_size
    )
    drawn = None if config.max_duration_seconds is None else _not_longer(index, config.max_duration_seconds)
    return TrainPlan(example_cost(index, prompts), drawn, shape, (seed,))


def example_cost(index: ShardIndex, prompts: TranscriptionPrompts) -> NDArray[np.int64]:
    """Positions of the language model that each sample takes, `(N,)`: its audio tokens and its text tokens."""
    windows = np.ceil(index.duration_seconds / prompts.window_seconds).astype(np.int64)
    cost: NDArray[np.int64] = windows * prompts.audio_tokens_per_window + index.records["num_text_tokens"]
    return cost


def _not_longer(index: ShardIndex, max_seconds: float) -> NDArray[np.int64]:
    sample_ids = np.flatnonzero(index.duration_seconds <= max_seconds)
    if len(sample_ids) == 0:
        raise UserError(
            f"`train_data`: none of the {len(index)} samples is as short as {max_seconds} s, so there is nothing to "
            "train on: raise `train_data.max_duration_seconds`."
        )
    return sample_ids


def _ignore_stop_signals(_worker: int) -> None:
    """Launchers signal whole process trees: the rank decides when to stop, and its workers end with it."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class _Places(Sequence[Place]):
    """A sampler that goes through the slots of each step."""

    def __init__(self, steps: range, slots: Sequence[int | None]) -> None:
        self._steps = steps
        self._slots = slots

    def __len__(self) -> int:
        return len(self._steps) * len(self._slots)

    def __getitem__(self, position: int) -> Place:  # type: ignore[override]
        if position >= len(self):
            raise IndexError(position)
        step, slot = divmod(position, len(self._slots))
        return self._steps[step], self._slots[slot]


class _SlotDataset(Dataset[MicroBatch]):
    """Micro-batches by their place in the run."""

    def __init__(
        self,
        index: ShardIndex,
        plan: TrainPlan,
        prompts: TranscriptionPrompts,
        config: TrainDataConfig,
        seed: int,
    ) -> None:
        self.num_samples = len(index)
        self.num_drawn = plan.num_samples
        self.fingerprint = index.fingerprint
        self._plan = plan
        self._prompts = prompts
        self._seed = seed
        self._spec_augment = config.spec_augment
        if config.spec_augment is not None:
            check_spec_augment(config.spec_augment, prompts.num_mel_bins)
        self._reader = SampleReader(index, prompts, config.max_target_tokens)
        self._augmentation = Augmentation(config.augmentation, prompts.sampling_rate) if config.augmentation else None

    def __getitem__(self, place: Place) -> MicroBatch:
        step, slot = place
        if slot is None:
            return weightless_micro_batch(self._prompts)
        drawn = self._plan.slot(step, slot)
        examples: list[Example] = []
        bad: list[BadSample] = []
        for sample_id in drawn.sample_ids.tolist():
            try:
                examples.append(self._example(sample_id, (self._seed, drawn.pass_index)))
            except SampleError as error:
                # Taken out, never replaced: the plan of all other slots stays as it is.
                bad.append(error.bad)
        if not examples:
            return weightless_micro_batch(self._prompts, bad)
        return collate(examples, self._prompts.pad_id, bad)

    def _example(self, sample_id: int, key: tuple[int, ...]) -> Example:
        example = self._reader.example(sample_id, self._augmentation, key)
        if self._spec_augment is None:
            return example
        prompts = self._prompts
        masks = draw_feature_masks(
            self._spec_augment,
            (*key, sample_id),
            math.ceil(round(example.duration_seconds * prompts.sampling_rate) / prompts.hop_samples),
            prompts.window_samples // prompts.hop_samples,
            prompts.num_mel_bins,
            frames_per_second=prompts.sampling_rate / prompts.hop_samples,
        )
        return replace(example, feature_masks=masks)
