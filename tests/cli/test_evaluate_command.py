"""`voxtral-dist evaluate`: result files and refusals."""

import errno
import json
import math
import os

import numpy as np
import pytest
import soundfile

from corpora import tone, write_lines


def test_evaluate_detects_languages_and_takes_lists_of_words(run, tiny_model, shard_folder, tmp_path, terminal):
    (tmp_path / "words.txt").write_text("bottles\nGenève\nXiaomi\nSiobhan\n", encoding="utf-8")
    options = ["--words", tmp_path / "words.txt", "--distractors", "0", "2", "--detect-language"]
    steps = ["--target-text", "lower_case", "--normalizer", "none"]
    result = run("evaluate", tiny_model, shard_folder, "--out", tmp_path / "out", *options, *steps)
    assert (result.code, len(result.out.splitlines())) == (0, 3)
    assert "evaluate speech-distractors-2 " in terminal.getvalue()
    assert "/26" in terminal.getvalue()
    for name, size in (("speech", None), ("speech-distractors-0", 0), ("speech-distractors-2", 2)):
        score = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        rows = [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
        assert score["normalizer"] == "lower_case+none-1"
        assert score["biased"]["num_distractors"] == size
        # Of 26 utterances, seven have bottles, six have Genève, and six are of unknown language.
        assert score["biased"]["biased_words"]["reference_length"] == 13
        assert score["language_identification"]["num_utterances"] == 20
        assert len(rows) == 26
        assert all(row["asks_for_language"] and "lang:" not in row["hypothesis"] for row in rows)
        for row in rows:
            listed = row["context"].removeprefix("Keywords: ").split(", ") if row["context"] else []
            true = {"bottles", "Genève"} & set(row["reference"].replace(",", "").split())
            assert len(listed) == (0 if size is None else size + len(true))
            assert size is None or true <= set(listed)
    assert "name its file by `--words`" in run("evaluate", tiny_model, shard_folder, "--distractors", "3").refusal()


def test_evaluate_replaces_its_own_results_alone(run, tiny_model, clip, tmp_path):
    manifest = write_lines(clip.parent / "short.jsonl", [{"audio_filepath": clip.name, "text": "a", "lang": "en"}])
    shards = clip.parent / "short"
    assert run("shards", "pack", manifest, shards).code == 0
    before = manifest.read_bytes()
    refused = run("evaluate", tiny_model, shards, "--out", clip.parent).refusal()
    assert f"`--out`: {manifest} would be replaced, and is not known to be a result" in refused
    assert manifest.read_bytes() == before
    options = ["--out", tmp_path / "out", "--max-tokens-per-second", "1"]
    for _ in range(2):
        assert run("evaluate", tiny_model, shards, *options).code == 0
    # One of two that an interrupted writing left is known for a result too.
    (tmp_path / "out" / "short.json").unlink()
    assert run("evaluate", tiny_model, shards, *options).code == 0
    long = shards.rename(shards.with_name(250 * "a"))
    assert "cannot be written: File name too long" in run("evaluate", tiny_model, long, "--out", tmp_path).refusal()
    assert "`--words`: " in run("evaluate", tiny_model, long, "--words", tmp_path / "nowhere.txt").refusal()


def test_a_field_that_no_utterance_has_is_reported(run, tiny_model, shard_folder, tmp_path, caplog):
    options = ["--slices", "nosuch", "language", "--max-tokens-per-second", "1", "--out", tmp_path / "out"]
    assert run("evaluate", tiny_model, shard_folder, *options).code == 0
    message = "No utterance of `speech` has the field `nosuch` that `slices` or `speaker_field` names."
    assert caplog.messages == [message]


def test_results_that_cannot_be_written_after_all_are_one_sentence(
    run, tiny_model, shard_folder, tmp_path, monkeypatch
):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("voxtral_dist.evaluation.evaluating.write_results", full)
    options = ["--max-tokens-per-second", "1", "--out", tmp_path / "out"]
    refused = run("evaluate", tiny_model, shard_folder, *options).refusal(74)
    assert "The results of `speech` cannot be written to" in refused
    assert "no space left on device" in refused


def test_the_loss_is_that_of_the_targets_that_the_steps_make(run, tiny_model, clip, tmp_path):
    losses = {}
    for name, text in (("loud", "ONE TWO, three"), ("quiet", "one two, three")):
        rows = [{"audio_filepath": clip.name, "text": text, "lang": "en"}]
        manifest = write_lines(clip.parent / f"{name}.jsonl", rows)
        assert run("shards", "pack", manifest, tmp_path / name).code == 0
        for steps in ((), ("--target-text", "lower_case")):
            assert run("evaluate", tiny_model, tmp_path / name, "--out", tmp_path / "out", *steps).code == 0
            losses[name, steps != ()] = json.loads((tmp_path / "out" / f"{name}.json").read_text())["loss"]
        # The stored text is what is compared, and what is written.
        assert json.loads((tmp_path / "out" / f"{name}.jsonl").read_text())["reference"] == text
    assert losses["loud", True] == losses["quiet", True] == losses["quiet", False] != losses["loud", False]


def test_answers_have_no_lists_and_no_language_to_detect(run, tiny_model, clip, tmp_path):
    manifest = write_lines(tmp_path / "m.jsonl", [{"audio_filepath": clip.name, "text": "Yes.", "lang": "en"}])
    assert run("shards", "pack", manifest, tmp_path / "set", "--instruction", "Is it loud?").code == 0
    result = run("evaluate", tiny_model, tmp_path / "set", "--out", tmp_path / "out", "--target-text", "lower_case")
    assert "normalizer basic-3" in result.out
    refused = run("evaluate", tiny_model, tmp_path / "set", "--detect-language").refusal()
    assert "its texts are answers to instructions" in refused


def test_a_test_set_with_an_utterance_beyond_the_models_positions_is_refused(run, tiny_model, tmp_path):
    soundfile.write(tmp_path / "long.flac", np.tile(tone(10.0), 33), 16_000)
    rows = [{"audio_filepath": "long.flac", "text": "one two", "lang": "en"}]
    assert run("shards", "pack", write_lines(tmp_path / "m.jsonl", rows), tmp_path / "set").code == 0
    refused = run("evaluate", tiny_model, tmp_path / "set", "--out", tmp_path / "out").refusal()
    assert "1 utterance with more than the model's 4096 positions; the longest (#0, 330 s) needs 41" in refused


def test_evaluate_measures_each_folder_or_refuses(run, tiny_model, clip, tmp_path):
    row = {"audio_filepath": clip.name, "text": "One two.", "lang": "en", "speaker": "x"}
    manifest = write_lines(tmp_path / "m.jsonl", [row | {"domain": "news"}, row])
    folders = [tmp_path / parent / "test" for parent in ("first", "second")]
    for folder in folders:
        assert run("shards", "pack", manifest, folder).code == 0
    options = ["--normalizer", "whisper_basic", "--slices", "domain"]
    result = run("evaluate", tiny_model, folders[0], "--out", tmp_path / "out", *options)
    assert result.code == 0
    assert result.out.startswith("test: WER ")
    assert "2 utterances, normalizer whisper_basic-transformers-" in result.out
    score = json.loads((tmp_path / "out" / "test.json").read_text())
    assert score["num_utterances"] == 2
    assert score["rtfx"] == pytest.approx(score["audio_seconds"] / score["decode_seconds"])
    assert score["perplexity"] == pytest.approx(math.exp(score["loss"]))
    assert {label: part["num_utterances"] for label, part in score["slices"]["domain"].items()} == {
        "news": 1,
        "unknown": 1,
    }
    rows = [json.loads(line) for line in (tmp_path / "out" / "test.jsonl").read_text().splitlines()]
    assert [row["fields"] for row in rows] == [{"domain": "news", "speaker": "x"}, {"speaker": "x"}]
    # What it wrote is scored without the model, to the same numbers.
    assert run("score", tmp_path / "out" / "test.jsonl", "--out", tmp_path / "again", *options).code == 0
    by_the_model = dict.fromkeys(("decode_seconds", "rtfx", "loss", "perplexity"))
    assert json.loads((tmp_path / "again" / "test.json").read_text()) == score | by_the_model
    refused = run("evaluate", tiny_model, folders[0], "--out", manifest).refusal()
    assert f"`--out`: {manifest} cannot be created" in refused, "before anything is decoded"
    # Both would be written to test.json: neither may be lost in silence.
    assert "same name" in run("evaluate", tiny_model, *folders, "--out", tmp_path / "both").refusal()
