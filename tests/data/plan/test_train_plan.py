"""The order of training is a pure function: every utterance once per epoch, for any number of ranks and workers."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from voxtral_dist.config import TrainDataConfig
from voxtral_dist.data.plan.cutting import Budget
from voxtral_dist.data.plan.example_sizes import ExampleSizes
from voxtral_dist.data.plan.streams import Stream, Streams, build_streams
from voxtral_dist.data.plan.train_plan import PlanShape, TrainPlan, rank_slots, refuse_idle_ranks
from voxtral_dist.data.stored.index import ShardIndex
from voxtral_dist.data.stored.shard_set import UNKNOWN_LANGUAGE
from voxtral_dist.data.training_set import _max_packed_tokens
from voxtral_dist.errors import UserError

from corpora import synthetic_set

SHAPE = PlanShape(slots_per_step=4, budget=Budget(3, None, None), megabatch_steps=5, shuffle_block_size=2)
SIZES = ExampleSizes(window_ms=30_000, audio_tokens_per_window=375, num_prompt_tokens=8, max_positions=131_072)


def make_plan(num_utterances: int, shape: PlanShape = SHAPE, seed: int = 0, max_seconds: float = 29.0) -> TrainPlan:
    index = ShardIndex([synthetic_set(num_utterances, max_seconds=max_seconds)])
    streams = Streams([Stream("all", num_utterances, num_utterances)], {}, None)
    return TrainPlan(index, streams, SIZES, shape, (seed,))


def positions_of(plan: TrainPlan, utterance_ids) -> np.ndarray:
    records = plan._index.gather(np.array(utterance_ids, dtype=np.int64))
    return SIZES.positions(SIZES.windows(records["duration_ms"]), records["num_text_tokens"])


def drawn_in_epoch(plan: TrainPlan, epoch_index: int = 0) -> list[int]:
    steps = range(epoch_index * plan.steps_per_epoch, (epoch_index + 1) * plan.steps_per_epoch)
    slots = [plan.slot(step, slot) for step in steps for slot in range(plan.num_slots(step))]
    assert {number for slot in slots for number in slot.epochs} == {epoch_index}
    return [utterance_id for slot in slots for utterance_id in slot.utterance_ids]


@pytest.mark.parametrize("num_utterances", [1, 5, 64, 101])
@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("budget", [Budget(1, None, None), Budget(3, None, None), Budget(None, 5, 2500)])
@pytest.mark.parametrize("megabatch_steps", [1, 5])
def test_every_utterance_is_drawn_once_per_epoch(num_utterances, block_size, slots, budget, megabatch_steps):
    plan = make_plan(num_utterances, PlanShape(slots, budget, megabatch_steps, block_size), max_seconds=70.0)
    for epoch_index in (0, 1, 7):
        assert sorted(drawn_in_epoch(plan, epoch_index)) == list(range(num_utterances))


@pytest.mark.parametrize("shape", [SHAPE, PlanShape(3, Budget(None, 5, None), 1, 1, max_packed_tokens=448)])
def test_a_slot_does_not_depend_on_what_was_asked_before(shape):
    plan = make_plan(101, shape)
    places = [(step, slot) for step in range(40) for slot in range(plan.num_slots(step))]
    in_order = {place: plan.slot(*place) for place in places}
    shuffled = make_plan(101, shape)
    for place in np.random.default_rng(0).permutation(places).tolist():
        assert shuffled.slot(*place) == in_order[tuple(place)]


def test_micro_batches_of_equal_examples_are_equally_full():
    plan = make_plan(101)
    sizes = [len(plan.slot(step, slot).utterance_ids) for step in range(plan.steps_per_epoch) for slot in range(4)]
    assert max(sizes) == 3
    assert max(sizes) - min(sizes) <= 1
    assert plan.steps_per_epoch == -(-101 // (4 * 3))


@pytest.mark.parametrize("budget", [Budget(None, 6, None), Budget(None, None, 4000), Budget(8, 12, 6000)])
@pytest.mark.parametrize("packed", [None, 448])
def test_no_micro_batch_exceeds_its_budget_and_most_are_nearly_full(budget, packed):
    plan = make_plan(3000, PlanShape(4, budget, 8, 1, packed), max_seconds=80.0)
    loads = []
    for step in range(plan.steps_per_epoch):
        for slot in range(plan.num_slots(step)):
            examples = plan.slot(step, slot)
            ends = np.cumsum([0, *examples.example_sizes])
            groups = [examples.utterance_ids[start:end] for start, end in pairwise(ends.tolist())]
            loads.append(load_of(plan, groups, budget))
    assert max(loads) <= 1.0
    assert np.mean(loads) > 0.7
    # A slot more than planned is rare.
    extra = sum(plan.num_slots(step) - 4 for step in range(plan.steps_per_epoch))
    assert extra <= 0.02 * 4 * plan.steps_per_epoch


def load_of(plan: TrainPlan, groups: list[tuple[int, ...]], budget: Budget) -> float:
    """The fraction of the tightest limit that a micro-batch takes, from the definitions."""
    if not groups:
        return 0.0
    durations = [int(plan._index.gather(np.array(group))["duration_ms"].sum()) for group in groups]
    texts = [int(plan._index.gather(np.array(group))["num_text_tokens"].sum()) + len(group) - 1 for group in groups]
    windows = [max(1, -(-duration // 30_000)) for duration in durations]
    longest = max(375 * count + 8 + text for count, text in zip(windows, texts, strict=True))
    values = ((len(groups), budget.max_examples), (sum(windows), budget.max_windows))
    shares = [value / limit for value, limit in (*values, (len(groups) * longest, budget.max_tokens)) if limit]
    return max(shares)


@pytest.mark.parametrize("megabatch_steps", [1, 4, 16])
@pytest.mark.parametrize("slots", [1, 2, 8])
def test_few_slots_are_empty_and_steps_never_are(slots, megabatch_steps):
    budget = Budget(None, 4, None)
    plan = make_plan(4000, PlanShape(slots, budget, megabatch_steps, 1), max_seconds=70.0)
    steps = [[plan.slot(step, slot) for slot in range(plan.num_slots(step))] for step in range(plan.steps_per_epoch)]
    assert all(any(slot.utterance_ids for slot in step) for step in steps)
    used = sum(bool(slot.utterance_ids) for step in steps for slot in step)
    assert used >= 0.95 * sum(map(len, steps))


def test_packed_examples_hold_the_budget_of_a_micro_batch():
    """A packed example larger than the budget would be alone in a micro-batch that is too large."""
    sizes_config = TrainDataConfig(shards=("x",), max_tokens=450, packing=True)
    limit = _max_packed_tokens(sizes_config, SIZES)
    plan = make_plan(2000, PlanShape(4, Budget(None, None, 450), 8, 1, limit), max_seconds=6.0)
    for step in range(plan.steps_per_epoch):
        for slot in range(plan.num_slots(step)):
            examples = plan.slot(step, slot)
            ends = np.cumsum([0, *examples.example_sizes]).tolist()
            groups = [examples.utterance_ids[start:end] for start, end in pairwise(ends)]
            assert load_of(plan, groups, Budget(None, None, 450)) <= 1.0


def test_packing_fills_windows_and_keeps_languages_apart():
    apart, packed = (
        make_plan(3000, replace(SHAPE, max_packed_tokens=limit), max_seconds=14.0) for limit in (None, 448)
    )
    assert sorted(drawn_in_epoch(packed)) == list(range(3000))
    assert packed.statistics.window_fill > 0.95 > 0.5 > apart.statistics.window_fill
    assert packed.steps_per_epoch < 0.6 * apart.steps_per_epoch
    for slot in (packed.slot(step, 0) for step in range(packed.steps_per_epoch)):
        ends = np.cumsum([0, *slot.example_sizes]).tolist()
        for start, end in pairwise(ends):
            records = packed._index.gather(np.array(slot.utterance_ids[start:end]))
            assert len(set(records["language"].tolist())) == 1
            assert end - start == 1 or records["duration_ms"].sum() <= 30_000


def test_epochs_and_seeds_give_different_orders():
    plan = make_plan(101)
    orders = [drawn_in_epoch(plan, epoch_index) for epoch_index in range(3)]
    orders += [drawn_in_epoch(make_plan(101, seed=seed)) for seed in (1, 2)]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_the_same_seed_gives_the_same_order():
    assert drawn_in_epoch(make_plan(101, seed=3)) == drawn_in_epoch(make_plan(101, seed=3))


def megabatches_of(plan: TrainPlan, shape: PlanShape) -> Iterator[list[tuple[int, ...]]]:
    for first in range(0, plan.steps_per_epoch, shape.megabatch_steps):
        steps = range(first, min(first + shape.megabatch_steps, plan.steps_per_epoch))
        yield [plan.slot(step, slot).utterance_ids for step in steps for slot in range(shape.slots_per_step)]


@pytest.mark.parametrize("num_utterances", [120, 180])
def test_micro_batches_of_a_megabatch_are_runs_of_its_sorted_costs(num_utterances):
    plan = make_plan(num_utterances, max_seconds=200.0)
    for megabatch in megabatches_of(plan, SHAPE):
        costs = [positions_of(plan, ids) for ids in megabatch if len(ids)]
        runs = sorted(costs, key=lambda run: (run.min(), run.max()))
        assert all(one.max() <= other.min() for one, other in pairwise(runs))


def test_micro_batches_of_a_megabatch_are_shuffled():
    plan = make_plan(120, max_seconds=200.0)
    means = [[positions_of(plan, ids).mean() for ids in megabatch] for megabatch in megabatches_of(plan, SHAPE)]
    assert all(costs not in (sorted(costs), sorted(costs, reverse=True)) for costs in means)
    # Differently in each megabatch: otherwise some slots would always get the short utterances.
    ranks = [np.argsort(np.argsort(costs)).tolist() for costs in means]
    assert ranks[0] != ranks[1]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_the_slots_of_all_ranks_are_the_slots_of_the_step(world_size):
    parts = [rank_slots(7, rank, world_size) for rank in range(world_size)]
    assert sorted(slot for part in parts for slot in part) == list(range(7))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_more_ranks_than_slots_are_refused():
    with pytest.raises(UserError, match=r"slots_per_step` is 4, but there are 5 ranks"):
        refuse_idle_ranks(4, 5)


# Mixtures: several sets, and languages inside them.

SET_SIZES = {"clean": 2900, "noisy": 1500, "tiny": 9}
MIXTURES = {
    "weights": {"weights": {"clean": 0.5, "noisy": 0.4, "tiny": 0.1}},
    "temperature over sets": {"set_temperature": 3.0},
    "temperature over languages": {"language_temperature": 2.0},
    "both": {"set_temperature": 2.0, "language_temperature": 5.0},
    "neither, with a filter": {"max_duration_seconds": 15.0},
}


def mixture(weights=None, **changes) -> tuple[TrainDataConfig, ShardIndex, Streams]:
    sets = {name: {"shards": [name], "weight": (weights or {}).get(name)} for name in SET_SIZES}
    config = TrainDataConfig(sets=sets, max_examples=4, slots_per_step=4, megabatch_steps=6, **changes)
    parts = [synthetic_set(size, seed=size, max_seconds=29.0) for size in SET_SIZES.values()]
    index = ShardIndex(parts)
    ends = dict(zip(SET_SIZES, np.cumsum(list(SET_SIZES.values())).tolist(), strict=True))
    return config, index, build_streams(config, index, ends, SIZES)


@pytest.mark.parametrize("changes", MIXTURES.values(), ids=MIXTURES.keys())
def test_every_megabatch_has_the_exact_mixture(changes):
    _, index, streams = mixture(**changes)
    plan = TrainPlan(index, streams, SIZES, PlanShape(4, Budget(4, None, None), 6, 1), (0,))
    stream_of = stream_of_utterances(streams)
    num_draws = sum(stream.num_draws for stream in streams.streams)
    drawn = [Counter[int]() for _ in range(3 * plan.steps_per_epoch)]
    for step in range(3 * plan.steps_per_epoch):
        for slot in range(plan.num_slots(step)):
            drawn[step].update(stream_of[utterance_id] for utterance_id in plan.slot(step, slot).utterance_ids)
    edges = [plan._first_step(megabatch) for megabatch in range(plan._num_megabatches + 1)]
    for epoch_index in range(3):
        for first, end in pairwise(edges):
            offset = epoch_index * plan.steps_per_epoch
            counts = sum(drawn[offset + first : offset + end], Counter())
            for number, stream in enumerate(streams.streams):
                exact = stream.num_draws * (end - first) / plan.steps_per_epoch
                assert abs(counts[number] - exact) < 1
    assert sum(sum(drawn, Counter()).values()) == 3 * num_draws


def stream_of_utterances(streams: Streams) -> dict[int, int]:
    found = {}
    for number, stream in enumerate(streams.streams):
        for utterance_id in streams.utterance_ids(number, np.arange(stream.num_utterances)).tolist():
            assert utterance_id not in found
            found[utterance_id] = number
    return found


@pytest.mark.parametrize("changes", MIXTURES.values(), ids=MIXTURES.keys())
def test_each_epoch_of_a_stream_draws_without_replacement(changes):
    _, index, streams = mixture(**changes)
    plan = TrainPlan(index, streams, SIZES, PlanShape(4, Budget(4, None, None), 6, 1), (0,))
    seen: Counter[tuple[int, int]] = Counter()
    for step in range(4 * plan.steps_per_epoch):
        for slot in range(plan.num_slots(step)):
            examples = plan.slot(step, slot)
            seen.update(zip(examples.utterance_ids, examples.epochs, strict=True))
    assert set(seen.values()) == {1}, "no utterance twice in an epoch of its stream"
    for number, stream in enumerate(streams.streams):
        members = set(streams.utterance_ids(number, np.arange(stream.num_utterances)).tolist())
        for whole_epoch in range(4 * stream.num_draws // stream.num_utterances):
            assert {
                utterance_id for utterance_id, in_epoch in seen if in_epoch == whole_epoch and utterance_id in members
            } == members


def test_weights_are_shares_of_the_audio():
    _, index, streams = mixture(weights={"clean": 0.5, "noisy": 0.4, "tiny": 0.1})
    means = [
        index.gather(streams.utterance_ids(number, np.arange(stream.num_utterances)))["duration_ms"].mean()
        for number, stream in enumerate(streams.streams)
    ]
    hours = np.array([stream.num_draws for stream in streams.streams]) * means
    np.testing.assert_allclose(hours / hours.sum(), [0.5, 0.4, 0.1], atol=0.002)


@pytest.mark.parametrize("set_temperature", [1.0, 3.0])
def test_temperatures_give_roots_of_hours_of_sets_and_of_languages_inside_them(set_temperature):
    _, index, streams = mixture(language_temperature=2.0, set_temperature=set_temperature)
    held, drawn = {}, {}
    for number, stream in enumerate(streams.streams):
        records = index.gather(streams.utterance_ids(number, np.arange(stream.num_utterances)))
        held[stream.name] = float(records["duration_ms"].sum())
        drawn[stream.name] = stream.num_draws * float(records["duration_ms"].mean())
        assert stream.drawn_seconds == pytest.approx(drawn[stream.name] / 1000)
    assert set(held) == {f"{name}/{language}" for name in SET_SIZES for language in ("de", "en", "unknown")}
    hours_of_set = {name: sum(held[f"{name}/{one}"] for one in ("de", "en", "unknown")) for name in SET_SIZES}
    weights = {name: hours ** (1 / set_temperature) for name, hours in hours_of_set.items()}
    roots = {name: sum(held[f"{name}/{one}"] ** 0.5 for one in ("de", "en", "unknown")) for name in SET_SIZES}
    for name, hours in held.items():
        set_name = name.partition("/")[0]
        share = weights[set_name] / sum(weights.values()) * hours**0.5 / roots[set_name]
        assert drawn[name] / sum(drawn.values()) == pytest.approx(share, abs=0.002)


def test_utterances_of_a_stream_are_those_of_its_set_and_language():
    _, index, streams = mixture(language_temperature=2.0)
    ends = np.cumsum(list(SET_SIZES.values()))
    records, languages = index.records, {"de": 0, "en": 1, "unknown": UNKNOWN_LANGUAGE}
    for number, stream in enumerate(streams.streams):
        set_name, _, language = stream.name.partition("/")
        end = ends[list(SET_SIZES).index(set_name)]
        in_set = np.arange(end - SET_SIZES[set_name], end)
        expected = in_set[records["language"][in_set] == languages[language]]
        assert streams.utterance_ids(number, np.arange(stream.num_utterances)).tolist() == expected.tolist()


def test_a_scan_in_many_parts_finds_the_same(monkeypatch):
    whole = mixture(language_temperature=2.0, max_duration_seconds=20.0)[2]
    monkeypatch.setattr(ShardIndex.chunks, "__defaults__", (100,))
    parts = mixture(language_temperature=2.0, max_duration_seconds=20.0)[2]
    assert parts.streams == whole.streams
    assert parts.skipped == whole.skipped
    for number, stream in enumerate(whole.streams):
        everything = np.arange(stream.num_utterances)
        assert np.array_equal(parts.utterance_ids(number, everything), whole.utterance_ids(number, everything))


def test_temperature_one_draws_every_utterance_once_an_epoch():
    _, index, streams = mixture()
    assert [stream.num_draws for stream in streams.streams] == [len(index)]


FILTERS = {
    "max_duration_seconds": (12.0, lambda records: records["duration_ms"] / 1000 <= 12.0),
    "min_duration_seconds": (3.0, lambda records: records["duration_ms"] / 1000 >= 3.0),
    "max_chars_per_second": (15.0, lambda records: records["num_chars"] <= 15.0 * records["duration_ms"] / 1000),
    "min_chars_per_second": (8.0, lambda records: records["num_chars"] >= 8.0 * records["duration_ms"] / 1000),
    "languages": (("de",), lambda records: records["language"] == 0),
    "max_tokens": (420, lambda records: 375 + 8 + records["num_text_tokens"] <= 420),
}


@pytest.mark.parametrize("names", [[name] for name in FILTERS] + [list(FILTERS)])
def test_exactly_the_utterances_that_pass_all_filters_are_drawn(names):
    changes = {name: FILTERS[name][0] for name in names}
    _, index, streams = mixture(**changes)
    kept = np.logical_and.reduce([FILTERS[name][1](index.records) for name in names])
    assert 0 < kept.sum() < len(index)
    plan = TrainPlan(index, streams, SIZES, SHAPE, (0,))
    assert sorted(drawn_in_epoch(plan)) == np.flatnonzero(kept).tolist()
    assert sum(streams.skipped.values()) == len(index) - kept.sum()


@pytest.mark.parametrize("changes", [{}, {"max_duration_seconds": 12.0, "language_temperature": 2.0}])
def test_the_audio_of_each_language_is_that_of_the_utterances_that_pass_the_filters(changes, monkeypatch):
    monkeypatch.setattr(ShardIndex.chunks, "__defaults__", (1000,))
    _, index, streams = mixture(**changes)
    records = index.records
    kept = records["duration_ms"] <= 1000 * changes.get("max_duration_seconds", math.inf)
    expected = {
        name: records["duration_ms"][kept & (records["language"] == number)].sum() / 1000
        for name, number in {"de": 0, "en": 1, "unknown": UNKNOWN_LANGUAGE}.items()
    }
    found = streams.seconds_by_language(index)
    assert found == pytest.approx(expected)
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_a_set_that_is_filtered_away_is_refused():
    with pytest.raises(
        UserError, match=r"no utterance of the training set passes the filters .4409 longer than `max_duration_seconds`"
    ):
        mixture(max_duration_seconds=0.01)
