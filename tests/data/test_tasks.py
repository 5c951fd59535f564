"""Prompts of transcripts and instructions, limits of length, and mixtures of tasks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from voxtral_dist.config import ContextConfig, ShardSetConfig, TrainDataConfig
from voxtral_dist.data.examples.bad_utterance import UtteranceError
from voxtral_dist.data.examples.micro_batch import IGNORED_LABEL
from voxtral_dist.data.examples.prompting import Prompting
from voxtral_dist.data.examples.reader import UtteranceReader
from voxtral_dist.data.loader import build_train_loader
from voxtral_dist.data.stored.index import read_index
from voxtral_dist.data.stored.index_files import INDEX_FILE, SHARD_TABLE_FILE
from voxtral_dist.data.stored.shard_set import RECORD
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.data.training_set import build_training_set, training_reader
from voxtral_dist.errors import UserError
from voxtral_dist.model.prompts import Transcript
from voxtral_dist.shards.corpus.corpus import open_corpus
from voxtral_dist.shards.corpus.fields import FieldNames
from voxtral_dist.shards.corpus.options import CorpusOptions, Instruction
from voxtral_dist.shards.packing import PackOptions, pack

from corpora import pack_manifest, tone, write_lines

QUESTIONS = ("How many bottles are there?", "Übersetze ins Englische: [/INST]</s>", "What is green?")


def packed_questions(folder: Path, num_utterances: int = 9) -> Path:
    """An instruction set: answers of any length, to a question of each utterance."""
    (folder / "audio").mkdir(parents=True)
    rows = []
    for number in range(num_utterances):
        soundfile.write(folder / "audio" / f"{number}.flac", tone(0.4 + 0.1 * number, seed=number), 16_000)
        answer = f"answer {number} " + "and so on, and so on, at length " * (number % 3)
        question = QUESTIONS[number % 3]
        rows.append({"audio_filepath": f"audio/{number}.flac", "text": answer, "lang": "en", "question": question})
    source = open_corpus(
        str(write_lines(folder / "manifest.jsonl", rows)),
        CorpusOptions(corpus_format="jsonl", instruction=Instruction(column="question")),
    )
    pack(source, folder / "set", PackOptions(10**9))
    return folder / "set"


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    return packed_questions(tmp_path_factory.mktemp("questions"))


def config_of(*folders: Path, **settings) -> TrainDataConfig:
    return TrainDataConfig(
        shards=tuple(map(str, folders)),
        **{"slots_per_step": 2, "max_examples": 3, "num_workers": 0, "megabatch_steps": 2} | settings,
    )


def examples_of(config, prompts, num_steps, seed=0):
    """Prompt ids and target ids of all examples."""
    loader = build_train_loader(config, prompts, seed, num_steps, 0, 1)
    for batches in loader.starting_at(0):
        for batch in batches.micro_batches:
            assert not batch.bad_utterances
            for ids, length, labels in zip(batch.input_ids, batch.positions_per_example, batch.labels, strict=True):
                targets = labels[labels != IGNORED_LABEL].tolist()
                read = ids[:length].tolist()
                if targets:
                    yield read[: len(read) - len(targets) + 1], targets


def test_an_instruction_set_asks_its_questions_and_learns_its_answers(questions, prompts):
    index = read_index([str(questions)])
    reader = UtteranceReader(index, prompts, 448)
    for utterance_id in range(len(index)):
        stored, example = reader.read(utterance_id), reader.example(utterance_id)
        question = QUESTIONS[utterance_id % 3]
        assert stored.instruction == question
        assert example.prompt == prompts.instruction(question, example.num_windows)
        assert list(example.completion) == prompts.completion(stored.text)
        assert not example.is_transcription
        assert int(index.record(utterance_id)["num_instruction_tokens"]) > 0
    assert "question" not in reader.read(0).fields


def test_sets_of_different_tasks_mix(questions, shard_folder, prompts):
    sets = {"ask": (questions, 0.5), "write": (shard_folder, 0.5)}
    config = TrainDataConfig(
        sets={name: ShardSetConfig(shards=(str(path),), weight=weight) for name, (path, weight) in sets.items()},
        slots_per_step=2,
        max_examples=3,
        num_workers=0,
    )
    steps = build_training_set(config, prompts, 0).plan.steps_per_epoch
    transcribe = prompts.transcription(None, 1)[-1]
    prompts_seen = [prompt for prompt, _ in examples_of(config, prompts, steps)]
    num_asked = sum(prompt[-1] != transcribe for prompt in prompts_seen)
    assert 0 < num_asked < len(prompts_seen)
    assert {prompts.decode(prompt) for prompt in prompts_seen if prompt[-1] != transcribe} == set(QUESTIONS)


def test_packing_leaves_instructions_alone(questions, shard_folder, prompts):
    config = config_of(questions, shard_folder, packing=True, max_examples=8)
    training_set = build_training_set(config, prompts, 0)
    num_questions = training_set.index.sets[0].shards[0].num_utterances
    sizes = []
    for step in range(training_set.plan.steps_per_epoch):
        for slot in range(training_set.plan.num_slots(step)):
            examples = training_set.plan.slot(step, slot)
            ids = iter(examples.utterance_ids)
            for size in examples.example_sizes:
                members = [next(ids) for _ in range(size)]
                sizes.append(size)
                assert size == 1 or min(members) >= num_questions
    assert max(sizes) > 1


def test_an_utterance_without_an_instruction_is_named(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(0.5), 16_000)
    manifest = write_lines(tmp_path / "manifest.jsonl", [{"audio_filepath": "a.wav", "text": "yes", "question": " "}])
    source = open_corpus(str(manifest), CorpusOptions(instruction=Instruction(column="question")))
    with pytest.raises(UserError, match=r"manifest\.jsonl:1: the utterance has no instruction: its field question"):
        pack(source, tmp_path / "set", PackOptions())


def test_an_index_of_a_format_without_instructions_is_refused(tmp_path, speech_manifest):
    folder = tmp_path / "set"
    pack_manifest(speech_manifest, folder, 10**9, skip_bad=False)
    before = np.dtype([(name if name != "num_instruction_tokens" else "flags", RECORD[name]) for name in RECORD.names])
    np.save(folder / INDEX_FILE, np.load(folder / INDEX_FILE).view(before))
    table = json.loads((folder / SHARD_TABLE_FILE).read_text())
    del table["most_instruction_tokens"], table["layout"]
    (folder / SHARD_TABLE_FILE).write_text(json.dumps(table | {"format": 2}))
    with pytest.raises(UserError, match=f"Index the set again: `voxtral-dist shards index {re.escape(str(folder))}`"):
        read_index([str(folder)])


def test_a_column_with_our_name_that_is_not_chosen_does_not_replace_what_is(tmp_path, prompts):
    soundfile.write(tmp_path / "a.wav", tone(0.5), 16_000)
    row = {"audio_filepath": "a.wav", "text": "yes", "lang": "en", "german": "ja", "sprache": "de"}
    names = FieldNames.chosen(None, "german", "sprache")
    source = open_corpus(str(write_lines(tmp_path / "manifest.jsonl", [row])), CorpusOptions(names=names))
    pack(source, tmp_path / "set", PackOptions())
    stored = UtteranceReader(read_index([str(tmp_path / "set")]), prompts, 448).read(0)
    assert (stored.text, stored.language) == ("ja", "de")
    assert (stored.fields["original_text"], stored.fields["original_lang"]) == ("yes", "en")


def test_answers_keep_their_case_and_marks_whatever_targets_lose(tmp_path, prompts):
    index = read_index([str(packed_questions(tmp_path))])
    reader = UtteranceReader(index, prompts, 448, prompting=Prompting(target_text=("lower_case", "no_punctuation")))
    example = reader.example(1)
    assert prompts.decode(example.completion[:-1]) == "answer 1 and so on, and so on, at length "


# Detection.


def test_the_configured_share_is_asked_without_the_tag_and_answers_with_it(shard_folder, prompts):
    config = config_of(shard_folder, untagged_fraction=0.4)
    steps = 10 * build_training_set(config, prompts, 0).plan.steps_per_epoch
    untagged = prompts.transcription(None, 1)[-2:]
    tagged = asked = 0
    for prompt, targets in examples_of(config, prompts, steps):
        detected = prompts.transcript(targets).language
        if tuple(prompt[-2:]) != untagged:
            tagged += 1
            assert detected is None
        elif detected is not None:
            asked += 1
    # A quarter of the utterances are of unknown language: no tag on either side.
    assert 0.32 < asked / (asked + tagged) < 0.48


def test_what_is_untagged_differs_between_epochs_and_not_between_runs():
    prompting = Prompting(untagged_fraction=0.5)
    drawn = [
        [prompting.is_untagged((0, epoch_index, utterance_id)) for utterance_id in range(64)]
        for epoch_index in range(3)
    ]
    assert drawn == [
        [prompting.is_untagged((0, epoch_index, utterance_id)) for utterance_id in range(64)]
        for epoch_index in range(3)
    ]
    assert drawn[0] != drawn[1] != drawn[2]
    assert not any(Prompting().is_untagged((0, 0, utterance_id)) for utterance_id in range(64))
    assert all(Prompting(untagged_fraction=1.0).is_untagged((0, 0, utterance_id)) for utterance_id in range(64))


def test_the_tag_changes_neither_the_transcripts_ids_nor_the_limit(shard_index, prompts):
    told = UtteranceReader(shard_index, prompts, 448).example(0)
    limit = len(told.completion)
    asked = UtteranceReader(shard_index, prompts, limit, prompting=Prompting(untagged_fraction=1.0)).example(0)
    assert asked.completion == (*prompts.tag("en"), *told.completion)
    assert asked.prompt == prompts.transcription(None, told.num_windows)
    assert prompts.transcript(asked.completion) == Transcript(told.reference, "en")
    assert len(asked.prompt) + len(asked.completion) == len(told.prompt) + len(told.completion)


# Limits.


def test_transcripts_over_the_limit_are_skipped_and_counted(shard_folder, prompts):
    index = read_index([str(shard_folder)])
    limit = int(np.median(index.records["num_text_tokens"]))
    expected = int((index.records["num_text_tokens"] + 1 > limit).sum())
    training_set = build_training_set(config_of(shard_folder, max_target_tokens=limit), prompts, 0)
    assert training_set.streams.skipped == {"with more tokens than `max_target_tokens`": expected}
    assert any(f"skipped {expected} of {len(index)}" in line for line in training_set.lines())


def test_transcripts_over_the_limit_are_refused_where_that_is_asked_for(shard_folder, prompts):
    limit = int(np.median(read_index([str(shard_folder)]).records["num_text_tokens"]))
    config = config_of(shard_folder, max_target_tokens=limit, too_long="refuse")
    with pytest.raises(
        UserError, match=r"`train_data.too_long` is `refuse`, but the training set has 1\d utterances with more tokens"
    ):
        build_training_set(config, prompts, 0)
    build_training_set(config_of(shard_folder, too_long="refuse"), prompts, 0)


def test_what_does_not_fit_into_the_models_positions_is_skipped_or_refused(shard_folder, prompts, monkeypatch):
    # 16 audio tokens a window, and up to four windows.
    monkeypatch.setattr(prompts, "max_positions", 60)
    training_set = build_training_set(config_of(shard_folder), prompts, 0)
    num_skipped = training_set.streams.skipped["with more positions than the model has"]
    assert 0 < num_skipped < len(training_set.index)
    with pytest.raises(UserError, match=f"{num_skipped} utterances with more positions than the model has"):
        build_training_set(config_of(shard_folder, too_long="refuse"), prompts, 0)


def test_limits_are_kept_when_an_utterance_is_read_too(shard_index, prompts, monkeypatch):
    completion = UtteranceReader(shard_index, prompts, 448).example(0).completion
    with pytest.raises(UtteranceError, match=f"has {len(completion)} target tokens, more than the limit") as refused:
        UtteranceReader(shard_index, prompts, len(completion) - 1).example(0)
    assert refused.value.bad.is_too_long
    monkeypatch.setattr(prompts, "max_positions", 40)
    longest = int(shard_index.records["duration_ms"].argmax())
    with pytest.raises(UtteranceError, match="positions of the language model, which has 40") as refused:
        UtteranceReader(shard_index, prompts, 448).example(longest)
    assert refused.value.bad.is_too_long


# Target text and contexts on the way through the loader.


def test_targets_are_made_by_the_configured_steps(shard_folder, prompts):
    config = config_of(shard_folder, target_text=("lower_case", "no_punctuation"), untagged_fraction=0)
    reader = training_reader(config, read_index([str(shard_folder)]), prompts, Storage(), None)
    texts = {reader.read(utterance_id).text for utterance_id in range(26)}
    assert "Übermorgen fährt der Zug früher 1" in texts
    targets = {prompts.transcript(targets).text for _, targets in examples_of(config, prompts, 9)}
    assert "übermorgen fährt der zug früher 1" in targets
    assert "l'été dernier à genève 2" in targets


def test_a_function_of_the_user_makes_targets_and_where_it_fails_the_utterance_is_bad(own, shard_folder, prompts):
    step = own("def f(text):\n    assert 'Zug' not in text\n    return text.upper()") + ":f"
    prompting = Prompting(target_text=(step,))
    reader = UtteranceReader(read_index([str(shard_folder)]), prompts, 448, prompting=prompting)
    text, other = (reader.read(utterance_id).text for utterance_id in (0, 1))
    assert prompts.transcript(reader.example(0).completion).text == text.upper()
    assert "Zug" in other
    message = rf"has a text that fails: The text step `{step}` failed on the text '{other}': AssertionError"
    with pytest.raises(UtteranceError, match=message):
        reader.example(1)


def test_packed_clips_have_the_targets_of_all_and_keep_their_texts(shard_folder, prompts):
    prompting = Prompting(target_text=("lower_case", "no_punctuation"))
    reader = UtteranceReader(read_index([str(shard_folder)]), prompts, 448, prompting=prompting)
    packed = reader.join([reader.load(1), reader.load(5)])
    assert packed.reference == f"{reader.read(1).text} {reader.read(5).text}" != packed.reference.lower()
    assert (
        prompts.transcript(packed.completion[:-1]).text
        == "übermorgen fährt der zug früher 1 übermorgen fährt der zug früher 5"
    )


def test_a_text_of_which_nothing_is_left_is_a_bad_utterance(tmp_path, prompts):
    soundfile.write(tmp_path / "a.wav", tone(0.5), 16_000)
    manifest = write_lines(tmp_path / "manifest.jsonl", [{"audio_filepath": "a.wav", "text": "?!", "lang": "en"}])
    pack_manifest(manifest, tmp_path / "set", 10**9, skip_bad=False)
    index = read_index([str(tmp_path / "set")])
    with pytest.raises(UtteranceError, match="has no text after the steps of `target_text`"):
        UtteranceReader(index, prompts, 448, prompting=Prompting(target_text=("no_punctuation",))).example(0)


def test_contexts_stand_in_prompts_and_in_the_budget(shard_folder, prompts, tmp_path):
    (tmp_path / "words.txt").write_text("bottles\nZug\nGenève\nvoltage\nSiobhan\n", encoding="utf-8")
    context = ContextConfig(words=tmp_path / "words.txt", fraction=1, max_tokens=40, true_word_fraction=1)
    config = config_of(shard_folder, context=context, max_examples=None, max_tokens=200)
    without = config.model_copy(update={"context": None})
    assert (
        build_training_set(config, prompts, 0).plan.statistics.num_examples
        < build_training_set(without, prompts, 0).plan.statistics.num_examples
    )
    loader = build_train_loader(config, prompts, 0, 8, 0, 1)
    seen = set()
    for batches in loader.starting_at(0):
        for batch in batches.micro_batches:
            for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
                text = prompts.decode(ids.tolist())
                assert "Keywords: " in text or not (labels != IGNORED_LABEL).any()
                if "bottles" in prompts.decode(labels[labels != IGNORED_LABEL].tolist()):
                    assert "bottles" in text.partition("Keywords: ")[2].partition("lang:")[0]
                    seen.add("bottles")
    assert seen


def test_other_words_are_other_data(shard_folder, prompts, tmp_path):
    (tmp_path / "words.txt").write_text("bottles\n", encoding="utf-8")
    config = config_of(shard_folder, context=ContextConfig(words=tmp_path / "words.txt"))
    before = build_training_set(config, prompts, 0).fingerprint
    assert build_training_set(config, prompts, 0).fingerprint == before
    (tmp_path / "words.txt").write_text("bottles\nZug\n", encoding="utf-8")
    assert build_training_set(config, prompts, 0).fingerprint != before
