"""The order of training is a pure function: every sample once per pass, whatever the number of ranks and workers."""

import hashlib
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch

from voxtral_dist.config import AugmentationStep, SpecAugmentConfig, TrainDataConfig
from voxtral_dist.data.batches import IGNORED_LABEL, MicroBatch
from voxtral_dist.data.loader import StepBatches, build_plan, build_train_loader
from voxtral_dist.data.plan import PlanShape, TrainPlan, permute, permute_blocks, rank_slots
from voxtral_dist.errors import UserError

SHAPE = PlanShape(slots_per_step=4, examples_per_slot=3, sort_window_steps=5, shuffle_block_size=2)


def costs(num_samples: int) -> np.ndarray:
    return np.random.default_rng(num_samples).integers(1, 400, num_samples)


def make_plan(num_samples: int, shape: PlanShape = SHAPE, seed: int = 0) -> TrainPlan:
    return TrainPlan(costs(num_samples), None, shape, (seed,))


def drawn_in_pass(plan: TrainPlan, shape: PlanShape, pass_index: int = 0) -> list[int]:
    steps = range(pass_index * plan.steps_per_pass, (pass_index + 1) * plan.steps_per_pass)
    slots = [plan.slot(step, slot) for step in steps for slot in range(shape.slots_per_step)]
    assert {slot.pass_index for slot in slots} == {pass_index}
    return [sample_id for slot in slots for sample_id in slot.sample_ids.tolist()]


@pytest.mark.parametrize("num_samples", [1, 5, 64, 101])
@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("examples", [1, 3])
@pytest.mark.parametrize("window", [1, 5])
def test_every_sample_is_drawn_once_per_pass(num_samples, block_size, slots, examples, window):
    shape = PlanShape(slots, examples, window, block_size)
    plan = make_plan(num_samples, shape)
    for pass_index in (0, 1, 7):
        assert sorted(drawn_in_pass(plan, shape, pass_index)) == list(range(num_samples))


def test_only_the_chosen_samples_are_drawn():
    chosen = np.array([3, 4, 8, 50, 99])
    plan = TrainPlan(costs(100), chosen, SHAPE, (0,))
    assert sorted(drawn_in_pass(plan, SHAPE)) == chosen.tolist()


@pytest.mark.parametrize("shape", [SHAPE, PlanShape(3, 5, 1, 1)])
def test_a_slot_does_not_depend_on_what_was_asked_before(shape):
    places = [(step, slot) for step in range(40) for slot in range(shape.slots_per_step)]
    plan = make_plan(101, shape)
    in_order = {place: plan.slot(*place).sample_ids.tolist() for place in places}
    shuffled = make_plan(101, shape)
    for place in np.random.default_rng(0).permutation(places).tolist():
        assert shuffled.slot(*place).sample_ids.tolist() == in_order[tuple(place)]


def test_a_micro_batch_never_holds_more_than_examples_per_slot():
    plan = make_plan(101)
    steps = range(plan.steps_per_pass)
    sizes = [len(plan.slot(step, slot).sample_ids) for step in steps for slot in range(SHAPE.slots_per_step)]
    assert max(sizes) == SHAPE.examples_per_slot
    # Only the last sort window of a pass is not full, and it spreads what is left evenly.
    last_window = len(sizes) - len(sizes) % (SHAPE.sort_window_steps * SHAPE.slots_per_step)
    assert set(sizes[:last_window]) == {SHAPE.examples_per_slot}
    assert max(sizes[last_window:]) - min(sizes[last_window:]) <= 1


def test_passes_and_seeds_give_different_orders():
    plan = make_plan(101)
    orders = [drawn_in_pass(plan, SHAPE, pass_index) for pass_index in range(3)]
    orders += [drawn_in_pass(make_plan(101, seed=seed), SHAPE) for seed in (1, 2)]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_the_same_seed_gives_the_same_order():
    assert drawn_in_pass(make_plan(101, seed=3), SHAPE) == drawn_in_pass(make_plan(101, seed=3), SHAPE)


def windows_of(plan: TrainPlan, shape: PlanShape) -> Iterator[list[np.ndarray]]:
    for first in range(0, plan.steps_per_pass, shape.sort_window_steps):
        steps = range(first, min(first + shape.sort_window_steps, plan.steps_per_pass))
        yield [plan.slot(step, slot).sample_ids for step in steps for slot in range(shape.slots_per_step)]


@pytest.mark.parametrize("num_samples", [120, 131])
def test_micro_batches_of_a_sort_window_are_runs_of_its_sorted_costs(num_samples):
    cost = costs(num_samples)
    for window in windows_of(make_plan(num_samples), SHAPE):
        runs = sorted((cost[ids] for ids in window if len(ids)), key=lambda run: (run.min(), run.max()))
        assert all(one.max() <= other.min() for one, other in pairwise(runs))


def test_micro_batches_of_a_sort_window_are_shuffled():
    cost = costs(120)
    means = [[cost[ids].mean() for ids in window] for window in windows_of(make_plan(120), SHAPE)]
    assert all(window != sorted(window) and window != sorted(window, reverse=True) for window in means)
    # Differently in each window: otherwise some slots would always get the short utterances.
    ranks = [np.argsort(np.argsort(window)).tolist() for window in means]
    assert ranks[0] != ranks[1]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_permute_is_a_bijection(size):
    for key in ((0,), (1, 2), (5, 0, 9)):
        assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_permute_is_computed_for_single_values_alike():
    whole = permute(np.arange(1000), 1000, (4,))
    assert [int(permute(np.array([value]), 1000, (4,))[0]) for value in (0, 1, 500, 999)] == whole[
        [0, 1, 500, 999]
    ].tolist()


@pytest.mark.parametrize("num_samples", [1, 7, 64, 100])
@pytest.mark.parametrize("block_size", [1, 3, 8, 200])
def test_blocks_of_neighbours_stay_together(num_samples, block_size):
    places = permute_blocks(np.arange(num_samples), num_samples, block_size, (1,)).tolist()
    assert sorted(places) == list(range(num_samples))
    first_of_blocks = [place for place in places if place % block_size == 0]
    in_blocks = [range(first, min(first + block_size, num_samples)) for first in first_of_blocks]
    assert places == [place for block in in_blocks for place in block]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_the_slots_of_all_ranks_are_the_slots_of_the_step(world_size):
    parts = [rank_slots(7, rank, world_size) for rank in range(world_size)]
    assert sorted(slot for part in parts for slot in part) == list(range(7))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_more_ranks_than_slots_are_refused():
    with pytest.raises(UserError, match=r"slots_per_step` is 4, but 5 ranks"):
        rank_slots(4, 0, 5)


# The same through the loader, on real shards. 26 samples, 15 a step: two steps a pass.
SLOTS_PER_STEP, NUM_STEPS = 5, 5


@pytest.fixture
def data_config(shard_folder):
    def build(**changes) -> TrainDataConfig:
        numbers = {"slots_per_step": SLOTS_PER_STEP, "examples_per_slot": 3, "sort_window_steps": 2, "num_workers": 0}
        return TrainDataConfig(shards=(shard_folder,), **numbers | changes)

    return build


def steps_of(config, prompts, rank=0, world_size=1, first_step=0) -> list[StepBatches]:
    loader = build_train_loader(config, prompts, seed=1, num_steps=NUM_STEPS, rank=rank, world_size=world_size)
    return list(loader.starting_at(first_step))


def examples_in(batch: MicroBatch) -> list[tuple]:
    """What each example feeds to the model, without padding: ids, targets and audio."""
    if batch.num_examples == 0:
        return []
    audio = iter(batch.pcm.split(batch.windows_per_example))
    rows = zip(batch.input_ids, batch.attention_mask.bool(), batch.labels, audio, strict=True)
    return [
        (
            tuple(ids[mask].tolist()),
            tuple(labels[labels != IGNORED_LABEL].tolist()),
            hashlib.sha256(pcm.numpy().tobytes()).hexdigest(),
        )
        for ids, mask, labels, pcm in rows
    ]


def global_batches(config, prompts, world_size: int) -> list[list[tuple]]:
    """For each step, the examples of all ranks together."""
    ranks = [steps_of(config, prompts, rank, world_size) for rank in range(world_size)]
    lengths = {len(batches.micro_batches) for steps in ranks for batches in steps}
    assert lengths == {-(-SLOTS_PER_STEP // world_size)}, "all ranks run equally many micro-batches in every step"
    return [
        sorted(example for batches in step for batch in batches.micro_batches for example in examples_in(batch))
        for step in zip(*ranks, strict=True)
    ]


@pytest.fixture(scope="module")
def one_rank_batches(shard_folder, prompts):
    numbers = {"slots_per_step": SLOTS_PER_STEP, "examples_per_slot": 3, "sort_window_steps": 2, "num_workers": 0}
    return global_batches(TrainDataConfig(shards=(shard_folder,), **numbers), prompts, 1)


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 2), (2, 0), (2, 2), (4, 0), (5, 0)])
def test_the_global_batch_does_not_depend_on_ranks_or_workers(
    data_config, prompts, one_rank_batches, world_size, num_workers
):
    assert global_batches(data_config(num_workers=num_workers), prompts, world_size) == one_rank_batches


def test_a_pass_of_the_loader_is_the_whole_shard_set(one_rank_batches, shard_index):
    first_pass = one_rank_batches[0] + one_rank_batches[1]
    assert len(first_pass) == len(shard_index)
    assert len(set(first_pass)) == len(shard_index)


def assert_same_tensors(one: MicroBatch, other: MicroBatch) -> None:
    for name in ("input_ids", "attention_mask", "labels", "pcm", "feature_masks"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("first_step", [1, 3])
def test_resuming_gives_the_tail_of_the_whole_run(data_config, prompts, num_workers, first_step):
    noise = AugmentationStep(name="AddGaussianSNR", arguments={"p": 0.7})
    masks = SpecAugmentConfig(max_time_mask_fraction=0.3)
    config = data_config(num_workers=num_workers, augmentation=(noise,), spec_augment=masks)
    whole = steps_of(data_config(augmentation=(noise,), spec_augment=masks), prompts, rank=1, world_size=2)
    tail = steps_of(config, prompts, rank=1, world_size=2, first_step=first_step)
    assert [batches.step for batches in tail] == list(range(first_step, NUM_STEPS))
    for resumed, uninterrupted in zip(tail, whole[first_step:], strict=True):
        for one, other in zip(resumed.micro_batches, uninterrupted.micro_batches, strict=True):
            assert_same_tensors(one, other)


def test_augmentation_differs_between_passes_and_not_between_ranks(data_config, prompts, one_rank_batches):
    noise = AugmentationStep(name="AddGaussianSNR", arguments={"p": 1.0})
    config = data_config(augmentation=(noise,))
    alone, shared = global_batches(config, prompts, 1), global_batches(config, prompts, 3)
    assert alone == shared
    passes = [{audio for step in alone[first : first + 2] for *_, audio in step} for first in (0, 2)]
    assert passes[0].isdisjoint(passes[1])


def test_more_ranks_than_slots_are_refused_before_anything_is_read(data_config, prompts):
    with pytest.raises(UserError, match=r"slots_per_step` is 5, but 6 ranks"):
        build_train_loader(data_config(), prompts, seed=0, num_steps=1, rank=0, world_size=6)


def test_samples_that_are_too_long_are_left_out_and_counted(data_config, prompts, shard_index):
    config = data_config(max_duration_seconds=2.0)
    loader = build_train_loader(config, prompts, seed=0, num_steps=1, rank=0, world_size=1)
    num_short = int((shard_index.duration_seconds <= 2.0).sum())
    assert 0 < num_short < len(shard_index)
    assert (loader.num_drawn, loader.num_samples) == (num_short, len(shard_index))
    plan = build_plan(config, shard_index, prompts, seed=0)
    shape = PlanShape(SLOTS_PER_STEP, 3, 2, 1)
    drawn = drawn_in_pass(plan, shape)
    assert len(drawn) == num_short
    assert shard_index.duration_seconds[drawn].max() <= 2.0


def test_a_limit_that_leaves_nothing_is_refused(data_config, prompts):
    with pytest.raises(UserError, match=r"none of the 26 samples is as short as 0\.01 s"):
        build_train_loader(data_config(max_duration_seconds=0.01), prompts, seed=0, num_steps=1, rank=0, world_size=1)


def test_an_unknown_augmentation_is_refused(data_config, prompts):
    config = data_config(augmentation=(AugmentationStep(name="Gian"),))
    with pytest.raises(UserError, match="no transform `Gian`"):
        build_train_loader(config, prompts, seed=0, num_steps=1, rank=0, world_size=1)
