"""The stream of micro-batches on real shards: the same for any number of ranks and workers, from any step on."""

import hashlib
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from voxtral_dist.config import AugmentationStep, SpecAugmentConfig, TrainDataConfig
from voxtral_dist.data.examples.example import Example
from voxtral_dist.data.examples.micro_batch import IGNORED_LABEL, MicroBatch, windows_of
from voxtral_dist.data.examples.reader import UtteranceReader
from voxtral_dist.data.loader import StepBatches, build_train_loader
from voxtral_dist.data.stored.index import read_index
from voxtral_dist.data.stored.index_files import INDEX_FILE, write_index
from voxtral_dist.data.stored.layout import Field, UtteranceLayout
from voxtral_dist.data.training_set import build_training_set
from voxtral_dist.errors import UserError

from corpora import pack_manifest, write_speech_manifest
from stored import read_table, write_table

SLOTS_PER_STEP, NUM_STEPS = 8, 7
NOISE = AugmentationStep(name="AddGaussianSNR", arguments={"p": 0.7})


@pytest.fixture(scope="module")
def uneven_folders(tmp_path_factory) -> list[str]:
    """37 utterances: a set of several shards, one empty and one with a single utterance, and a set of one shard."""
    folder = tmp_path_factory.mktemp("uneven")
    for name, count, shard_bytes in (("many", 36, 300_000), ("one", 1, 10**9)):
        manifest = write_speech_manifest(folder / f"speech-{name}", count, max_seconds=2.5, seed=count)
        pack_manifest(manifest, folder / name, shard_bytes, skip_bad=False)
    table = read_table(folder / "many")
    (folder / "many" / "many-empty.tar").write_bytes(bytes(10_240))
    empty = {"location": "many-empty.tar", "num_utterances": 0, "num_bytes": 10_240, "sha256": "0" * 64}
    table["shards"].insert(1, empty)
    write_table(folder / "many", table)
    return [str(folder / "many"), str(folder / "one")]


# Every way of making batches, each of which has to give the same stream everywhere.
CONFIGS = {
    "a number of examples": {"max_examples": 2},
    "budgets": {"max_windows": 3, "max_tokens": 200, "augmentation": (NOISE,)},
    "packed": {"max_windows": 2, "packing": True, "augmentation": (NOISE,), "spec_augment": SpecAugmentConfig()},
    "a mixture": {"max_examples": 2, "language_temperature": 3.0},
    "filters and blocks": {"max_examples": 3, "max_duration_seconds": 1.9, "shuffle_block_size": 4},
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys(), scope="module")
def config(request, uneven_folders) -> TrainDataConfig:
    common = {"shards": tuple(uneven_folders), "slots_per_step": SLOTS_PER_STEP, "megabatch_steps": 2}
    return TrainDataConfig(**common | {"num_workers": 0} | request.param)


def steps_of(config, prompts, rank=0, world_size=1, first_step=0, num_steps=NUM_STEPS) -> list[StepBatches]:
    loader = build_train_loader(config, prompts, seed=1, num_steps=num_steps, rank=rank, world_size=world_size)
    return list(loader.starting_at(first_step))


def examples_in(batch: MicroBatch) -> list[tuple]:
    """What each example feeds to the model, without padding: ids, targets, audio and masks."""
    if batch.num_utterances == 0:
        return []
    audio = iter(batch.pcm.split(batch.windows_per_example))
    ends = np.cumsum(batch.windows_per_example)
    rows = zip(batch.input_ids, batch.positions_per_example, batch.labels, audio, ends, strict=True)
    return [
        (
            tuple(ids[:length].tolist()),
            tuple(labels[labels != IGNORED_LABEL].tolist()),
            hashlib.sha256(pcm.numpy().tobytes()).hexdigest(),
            tuple(
                (window - (end - len(pcm)), *rest)
                for window, *rest in batch.feature_masks.tolist()
                if end - len(pcm) <= window < end
            ),
        )
        for ids, length, labels, pcm, end in rows
    ]


def audio_digest(example: Example, prompts) -> str:
    windows = windows_of([example], prompts.window_samples)
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()


def global_batches(config, prompts, world_size: int, first_step: int = 0) -> list[list[tuple]]:
    """For each step, the examples of all ranks together."""
    ranks = [steps_of(config, prompts, rank, world_size, first_step) for rank in range(world_size)]
    for steps in zip(*ranks, strict=True):
        assert len({len(batches.micro_batches) for batches in steps}) == 1, "all ranks run equally many micro-batches"
    return [
        sorted(example for batches in step for batch in batches.micro_batches for example in examples_in(batch))
        for step in zip(*ranks, strict=True)
    ]


@pytest.fixture(scope="module")
def unbroken(config, prompts) -> list[list[tuple]]:
    """The global batches of one rank that never stops."""
    return global_batches(config, prompts, 1)


def test_no_micro_batch_has_more_windows_than_the_training_set_says(config, prompts):
    most = build_training_set(config, prompts, seed=1).max_windows_per_micro_batch
    found = [batch.num_windows for step in steps_of(config, prompts) for batch in step.micro_batches]
    assert max(found) <= most
    assert most - max(found) <= 2, "a bound that says something"


def with_workers(config: TrainDataConfig, num_workers: int) -> TrainDataConfig:
    return config.model_copy(update={"num_workers": num_workers})


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 1), (1, 3), (2, 0), (2, 2), (4, 1), (6, 0), (8, 0)])
def test_the_global_batches_depend_neither_on_ranks_nor_on_workers(config, prompts, unbroken, world_size, num_workers):
    assert global_batches(with_workers(config, num_workers), prompts, world_size) == unbroken


@pytest.mark.parametrize(("first_step", "world_size", "num_workers"), [(1, 2, 0), (3, 6, 0), (4, 3, 1), (6, 8, 0)])
def test_a_run_resumed_with_other_ranks_is_the_run_that_never_stopped(
    config, prompts, unbroken, first_step, world_size, num_workers
):
    rest = global_batches(with_workers(config, num_workers), prompts, world_size, first_step)
    assert rest == unbroken[first_step:]


def test_three_workers_of_two_ranks_read_every_utterance_once_an_epoch(uneven_folders, prompts):
    """With fewer shards in a set than workers, an empty shard, and a prime number of utterances."""
    config = TrainDataConfig(
        shards=tuple(uneven_folders), slots_per_step=4, max_examples=2, num_workers=3, untagged_fraction=0
    )
    index = read_index(uneven_folders)
    assert len(index) == 37
    steps_per_epoch = build_training_set(config, prompts, 1).plan.steps_per_epoch
    seen: Counter[tuple] = Counter()
    for rank in range(2):
        for batches in steps_of(config, prompts, rank, 2, num_steps=steps_per_epoch):
            assert not any(batch.bad_utterances for batch in batches.micro_batches)
            seen.update((one[0], one[2]) for batch in batches.micro_batches for one in examples_in(batch))
    reader = UtteranceReader(index, prompts, 448)
    stored = [reader.example(utterance_id) for utterance_id in range(37)]
    expected = Counter(((*one.prompt, *one.completion[:-1]), audio_digest(one, prompts)) for one in stored)
    assert seen == expected


@pytest.mark.parametrize("num_epochs", [1, 3])
def test_a_run_of_epochs_draws_every_utterance_exactly_that_often(uneven_folders, prompts, num_epochs):
    common = {"shards": tuple(uneven_folders), "slots_per_step": 3, "num_workers": 0, "untagged_fraction": 0}
    config = TrainDataConfig(**common, max_windows=5, max_tokens=200, megabatch_steps=2)
    seen: Counter[tuple] = Counter()
    lengths = set()
    for rank in range(2):
        loader = build_train_loader(config, prompts, 1, lambda steps_per_epoch: num_epochs * steps_per_epoch, rank, 2)
        lengths.add(loader.num_steps)
        for batches in loader.starting_at(0):
            seen.update(one for batch in batches.micro_batches for one in examples_in(batch))
    assert len(lengths) == 1
    assert len(seen) == 37
    assert set(seen.values()) == {num_epochs}


def assert_same_tensors(one: MicroBatch, other: MicroBatch) -> None:
    for name in ("input_ids", "audio_places", "target_places", "target_ids", "pcm", "feature_masks"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("first_step", [1, 3])
def test_resuming_gives_the_very_tensors_of_the_whole_run(config, prompts, num_workers, first_step):
    whole = steps_of(config, prompts, rank=1, world_size=2)
    tail = steps_of(with_workers(config, num_workers), prompts, rank=1, world_size=2, first_step=first_step)
    assert [batches.step for batches in tail] == list(range(first_step, NUM_STEPS))
    for resumed, uninterrupted in zip(tail, whole[first_step:], strict=True):
        for one, other in zip(resumed.micro_batches, uninterrupted.micro_batches, strict=True):
            assert_same_tensors(one, other)


def test_augmentation_differs_between_epochs(uneven_folders, prompts):
    config = TrainDataConfig(
        shards=tuple(uneven_folders), slots_per_step=5, max_examples=8, num_workers=0, augmentation=(NOISE,)
    )
    batches = global_batches(config, prompts, 1)
    assert len(batches[0]) == 37, "a step is an epoch"
    epochs = [{example[2] for example in step} for step in batches[:2]]
    # With p = 0.7, about one in eleven is not augmented in either epoch.
    assert len(epochs[0] & epochs[1]) < 37 / 4


def test_packed_examples_hold_the_audio_and_text_of_their_utterances(uneven_folders, prompts):
    config = TrainDataConfig(
        shards=tuple(uneven_folders), slots_per_step=2, max_windows=8, packing=True, num_workers=0, megabatch_steps=2
    )
    training_set = build_training_set(config, prompts, 1)
    reader = UtteranceReader(training_set.index, prompts, 448)
    num_packed = 0
    for batches in steps_of(config, prompts, num_steps=training_set.plan.steps_per_epoch):
        for slot, batch in enumerate(batches.micro_batches):
            examples = training_set.plan.slot(batches.step, slot)
            assert batch.num_utterances == len(examples.utterance_ids)
            num_packed += sum(size > 1 for size in examples.example_sizes)
            drawn, audio = iter(examples.utterance_ids), batch.pcm.split(batch.windows_per_example)
            for row, size in enumerate(examples.example_sizes):
                utterances = [reader.load(utterance_id) for utterance_id in islice(drawn, size)]
                joined = np.concatenate([one.pcm for one in utterances])
                assert np.array_equal(audio[row].flatten()[: len(joined)].numpy(), joined)
                targets = batch.labels[row][batch.labels[row] != IGNORED_LABEL].tolist()
                assert prompts.transcript(targets).text == " ".join(one.text for one in utterances)
                assert len({one.language for one in utterances}) == 1
    assert num_packed > 0


def test_a_bad_utterance_of_a_packed_example_is_dropped(tmp_path, prompts):
    manifest = write_speech_manifest(tmp_path / "speech", 12, max_seconds=0.5)
    pack_manifest(manifest, tmp_path / "set", 10**9, skip_bad=False)
    config = TrainDataConfig(
        shards=(str(tmp_path / "set"),), slots_per_step=1, max_windows=20, packing=True, num_workers=0
    )
    slot = build_training_set(config, prompts, 1).plan.slot(0, 0)
    assert max(slot.example_sizes) > 1
    damaged = slot.utterance_ids[slot.example_sizes.index(max(slot.example_sizes))]
    span = read_index([tmp_path / "set"]).span(damaged)
    with Path(span.location).open("r+b") as tar:
        tar.seek(span.offset + 600)
        tar.write(b"\xff" * 64)
    batch = steps_of(config, prompts, num_steps=1)[0].micro_batches[0]
    assert (batch.num_utterances, len(batch.bad_utterances)) == (11, 1)


def test_every_utterance_of_a_packed_example_that_is_too_long_is_used_or_named(uneven_folders, prompts):
    """The tiny model's tokens are many more than those that the index counts with the published vocabulary."""
    config = TrainDataConfig(
        shards=tuple(uneven_folders), slots_per_step=2, max_windows=8, packing=True, num_workers=0, max_target_tokens=40
    )
    steps_per_epoch = build_training_set(config, prompts, 1).plan.steps_per_epoch
    batches = [batch for step in steps_of(config, prompts, num_steps=steps_per_epoch) for batch in step.micro_batches]
    bad = [one for batch in batches for one in batch.bad_utterances]
    assert len(bad) > 0
    assert sum(batch.num_utterances for batch in batches) + len({(one.shard, one.key) for one in bad}) == 37


@pytest.mark.parametrize("prefetching", [1, 3])
def test_workers_run_two_steps_ahead_and_no_further(uneven_folders, prompts, prefetching, monkeypatch):
    config = TrainDataConfig(
        shards=tuple(uneven_folders), slots_per_step=6, max_examples=1, num_workers=prefetching, megabatch_steps=2
    )
    loader = build_train_loader(config, prompts, 0, 50, 0, 1)
    asked = []
    plan = loader.training_set.plan
    whole = plan.slot
    monkeypatch.setattr(plan, "slot", lambda step, slot: asked.append(step) or whole(step, slot))
    stream = loader.starting_at(0)
    next(stream)
    # The step in use, two that are being made, and one of which the first requests are known.
    assert max(asked) <= 4
    del stream


def move_folder(folder: Path) -> Path:
    return folder.rename(folder.with_name("moved"))


def rename_shards(folder: Path) -> Path:
    table = read_table(folder)
    for shard in table["shards"]:
        name = f"renamed-{shard['location']}"
        (folder / shard["location"]).rename(folder / name)
        shard["location"] = name
    write_table(folder, table)
    return folder


@pytest.mark.parametrize("change", [move_folder, rename_shards])
def test_the_place_of_shards_is_not_in_the_fingerprint(shard_folder, prompts, tmp_path, change):
    copied = shutil.copytree(shard_folder, tmp_path / "copied")
    before, places = fingerprint([copied], prompts), locations(copied)
    changed = change(copied)
    assert not places & locations(changed)
    assert fingerprint([changed], prompts) == before


def locations(folder: Path) -> set[str]:
    return {shard.location for shard in read_index([str(folder)]).shards}


def test_other_records_another_layout_and_other_sets_have_other_fingerprints(uneven_folders, prompts, tmp_path):
    before = fingerprint(uneven_folders, prompts)
    copied = shutil.copytree(uneven_folders[0], tmp_path / "copied")
    index = read_index([str(copied)])
    records = np.load(copied / INDEX_FILE)
    records["num_text_tokens"][3] += 1
    shards, languages = index.sets[0].shards, index.sets[0].languages
    write_index(copied, shards, records, languages)
    after_records = fingerprint([copied, uneven_folders[1]], prompts)
    records["num_text_tokens"][3] -= 1
    write_index(copied, shards, records, languages, UtteranceLayout(text=Field("txt")))
    after_layout = fingerprint([copied, uneven_folders[1]], prompts)
    write_index(copied, shards, records, languages)
    assert fingerprint([copied, uneven_folders[1]], prompts) == before
    named = {"many": {"shards": uneven_folders[:1]}, "one": {"shards": uneven_folders[1:]}}
    in_sets = build_training_set(TrainDataConfig(sets=named, max_examples=2), prompts, 0).fingerprint
    assert len({before, after_records, after_layout, in_sets}) == 4


def fingerprint(shards: list, prompts) -> str:
    config = TrainDataConfig(shards=tuple(map(str, shards)), max_examples=2)
    return build_training_set(config, prompts, 0).fingerprint


def test_a_shard_that_is_named_twice_is_refused(uneven_folders, prompts):
    many = uneven_folders[0]
    config = TrainDataConfig(shards=(many, f"{many}/many-00000[01].tar"), max_examples=1)
    with pytest.raises(UserError, match=r"two patterns match the shard .*many-000000\.tar"):
        build_training_set(config, prompts, 0)


def test_shards_without_utterances_are_refused(uneven_folders, prompts):
    config = TrainDataConfig(shards=(f"{uneven_folders[0]}/many-empty.tar",), max_examples=1)
    with pytest.raises(UserError, match=r"`train_data\.shards`: the shards contain no utterances"):
        build_training_set(config, prompts, 0)


def test_a_language_that_no_utterance_has_is_refused(uneven_folders, prompts):
    config = TrainDataConfig(shards=tuple(uneven_folders), max_examples=1, languages=("pt",))
    with pytest.raises(
        UserError, match="no utterance has the language 'pt'; the languages of the index are de, en, fr"
    ):
        build_training_set(config, prompts, 0)


def test_more_ranks_than_slots_are_refused_before_anything_is_read(prompts):
    config = TrainDataConfig(shards=("nowhere",), slots_per_step=5, max_examples=1)
    with pytest.raises(UserError, match=r"slots_per_step` is 5, but there are 6 ranks"):
        build_train_loader(config, prompts, seed=0, num_steps=1, rank=0, world_size=6)


def test_an_unknown_augmentation_is_refused(uneven_folders, prompts):
    config = TrainDataConfig(
        shards=tuple(uneven_folders), max_examples=1, augmentation=(AugmentationStep(name="Gian"),)
    )
    with pytest.raises(UserError, match="no transform `Gian`"):
        build_train_loader(config, prompts, seed=0, num_steps=1, rank=0, world_size=1)
