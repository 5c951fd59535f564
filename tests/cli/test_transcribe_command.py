"""`voxtral-dist transcribe`: transcripts, files and refusals."""

import json
import math
import os
import shutil
import subprocess
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from transformers import VoxtralForConditionalGeneration

from voxtral_dist.evaluation.continuous_decoder import ContinuousDecoder
from voxtral_dist.model.tiny import build_tiny_voxtral
from voxtral_dist.model.voxtral import TrainedVoxtral
from voxtral_dist.transcription.question import Question
from voxtral_dist.transcription.recordings import RecordingError
from voxtral_dist.transcription.transcriber import Transcriber
from voxtral_dist.transcription.transcripts import RecordingTranscript, Segment

from commands import PROGRAM
from corpora import TINY_SHAPE, tone


def test_transcribe_prints_each_clip_with_its_transcript(run, tiny_model, clip, terminal):
    result = run("transcribe", tiny_model, clip, clip, "--language", "en")
    assert result.code == 0
    # A model with random weights may say anything, but of one recording twice the same.
    first, second = result.out.split(f"{clip}\t")[1:]
    assert first == second
    # The bar is for the terminal, and transcripts for standard output, which may be a file.
    assert "transcribe 2/2" in terminal.getvalue()
    assert str(clip) not in terminal.getvalue()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("{folder}/nowhere.wav",), "nowhere.wav cannot be read: No such file"),
        (("{folder}/empty",), "empty holds no audio: no file in it ends with one of"),
        (("{folder}/notes.txt",), "notes.txt does not decode"),
        (("{folder}/" + 300 * "a" + ".wav",), "cannot be read: File name too long"),
        (("{folder}/clip.wav", "{folder}/clip.wav", "--out", "{folder}/out"), "into different folders"),
        (("{folder}/clip.wav", "--format", "srt"), "name their folder by `--out`"),
        (("{folder}/clip.wav", "--out", "{folder}/notes.txt"), "`--out`: "),
        (("{folder}/clip.wav", "--instruction", "What?", "--max-segment-seconds", "5"), "is about whole recordings"),
        (
            ("{folder}/clip.wav", "--language", "klingon"),
            "the language 'klingon', which is not an ISO 639-1 code such as 'en'",
        ),
    ],
)
def test_a_clip_that_cannot_be_transcribed_is_one_sentence(run, tiny_model, clip, arguments, sentence):
    (clip.parent / "notes.txt").write_text("no audio\n")
    (clip.parent / "empty").mkdir(exist_ok=True)
    refused = run("transcribe", tiny_model, *(argument.format(folder=clip.parent) for argument in arguments)).refusal()
    assert sentence in refused
    assert " at 0x" not in refused


def test_options_of_decoding_reach_the_model(run, tiny_model, clip, monkeypatch):
    generate, asked = VoxtralForConditionalGeneration.generate, []

    def recorded(model, **settings):
        asked.append((settings["num_beams"], settings.get("cache_implementation")))
        return generate(model, **settings)

    monkeypatch.setattr(VoxtralForConditionalGeneration, "generate", recorded)
    make_cache, rows = ContinuousDecoder._make_cache, []

    def made(decoder, num_rows, num_positions):
        rows.append(num_rows)
        make_cache(decoder, num_rows, num_positions)

    monkeypatch.setattr(ContinuousDecoder, "_make_cache", made)

    def segment(*options: str) -> dict[str, Any]:
        (only,) = json.loads(run("transcribe", tiny_model, clip, "--json", *options).out)["segments"]
        return only

    usual = segment()
    limited = segment("--max-tokens-per-second", "1")
    limit = 16 + math.ceil(usual["end_seconds"])
    assert limited["hit_limit"]
    assert limited["num_tokens"] == limit < usual["num_tokens"]
    assert segment("--max-windows", "1") == segment("--batch-size", "3") == usual
    assert asked == [], "greedy decoding is our own"
    assert rows == [8, 8, 1, 3]
    assert segment("--beams", "3") == segment("--beams", "3", "--static-cache")
    assert asked == [(3, None), (3, "static")]


def test_a_gpu_without_room_is_one_sentence(run, tiny_model, clip, shard_folder, tmp_path, monkeypatch):
    asked = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 24 GiB of which 12 MiB is free"
    )

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError(f"{asked}. Including non-PyTorch memory, this process has 23.66 GiB in use.\nMore")

    monkeypatch.setattr(TrainedVoxtral, "causal_states", full)
    in_transcribe = run("transcribe", tiny_model, clip).refusal(3)
    assert f"Rank 0 ran out of GPU memory ({asked}): in training, use smaller micro-batches" in in_transcribe
    in_evaluate = run("evaluate", tiny_model, shard_folder, "--out", tmp_path / "out").refusal(3)
    assert "The evaluation of `speech` ended on rank 0: out of GPU memory in a batch (" in in_evaluate
    assert f"({asked}): lower `evaluation.batch_size`" in in_evaluate


def test_transcribe_takes_context_or_an_instruction_and_writes_json(run, tiny_model, clip):
    (clip.parent / "words.txt").write_text("Siobhan\nXiaomi\n")
    contexts = ["--words", clip.parent / "words.txt", "--previous-text", "what was said"]
    for asked in (contexts, ["--instruction", "What is this?"], []):
        result = run("transcribe", tiny_model, clip, "--json", *asked)
        assert result.code == 0
        row = json.loads(result.out)
        assert row.keys() == {"clip", "text", "detected_language", "segments"}
        assert row["clip"] == str(clip)
    refused = run("transcribe", tiny_model, clip, "--instruction", "What?", "--language", "en").refusal()
    assert "`--instruction` replaces the request to transcribe" in refused
    assert "`--words`: " in run("transcribe", tiny_model, clip, "--words", clip.parent / "nowhere.txt").refusal()


def test_a_clip_that_cannot_be_transcribed_does_not_keep_the_others_from_it(run, tiny_model, clip, tmp_path):
    (tmp_path / "notes.txt").write_text("no audio\n")
    result = run("transcribe", tiny_model, clip, tmp_path / "notes.txt", clip)
    assert result.code == 2
    assert result.out.count(f"{clip}\t") == 2
    assert "notes.txt does not decode" in result.err
    assert "1 of 3 recordings could not be transcribed" in result.err


def test_a_clip_that_is_longer_than_the_model_has_positions_is_cut_unless_a_question_is_about_it(run, tmp_path):
    # 512 positions: 12.5 a second for the audio, and as many for the transcript.
    model, path = tmp_path / "model", tmp_path / "long.flac"
    build_tiny_voxtral(model, replace(TINY_SHAPE, max_text_positions=512))
    soundfile.write(path, np.tile(tone(10.0), 5), 16_000)
    row = json.loads(run("transcribe", model, path, "--json").out)
    ends = [segment["end_seconds"] for segment in row["segments"]]
    assert ends[-1] == 50.0
    assert [0.0, *ends[:-1]] == [segment["start_seconds"] for segment in row["segments"]]
    assert len(ends) > 1
    crowded = run("transcribe", model, path, "--max-tokens-per-second", "5000").refusal()
    assert "leaves no room for 1.28 s of audio with 5000 tokens a second" in crowded
    refused = run("transcribe", model, path, "--instruction", "What?").refusal()
    assert "long.flac lasts 50 s, but the model has room for 19 s" in refused


def test_ranks_share_clips_and_one_that_is_broken_ends_none_of_them(tiny_model, clip, tmp_path):
    clips = [tmp_path / f"{number}.wav" for number in range(5)]
    for path in clips:
        shutil.copy(clip, path)
    # The first of the second rank, which would be done long before the first one.
    clips[1].write_bytes(b"no audio")
    command = [PROGRAM.with_name("torchrun"), "--standalone", "--nproc-per-node=2", "--no-python", PROGRAM]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [*command, "transcribe", tiny_model, *clips, "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
        check=False,
    )
    assert ended.returncode != 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.txt", "2.txt", "3.txt", "4.txt"]
    assert ended.stderr.count("1.wav does not decode") == 1
    assert ended.stderr.count("1 of 5 recordings could not be transcribed; the messages above say why") == 1


def test_batches_of_clips_keep_within_their_windows(tiny_model, clip, tmp_path):
    soundfile.write(tmp_path / "long.wav", tone(3.0), 16_000)
    (tmp_path / "broken.wav").write_bytes(b"no audio")
    soundfile.write(tmp_path / "silent.wav", np.zeros(16_000, dtype=np.int16), 16_000)
    transcriber = Transcriber.from_pretrained(str(tiny_model), device="cpu", batch_size=3, max_windows=4)
    decode, asked = transcriber._decoder, []

    def recorded(examples):
        asked.append([example.num_windows for example in examples])
        return decode(examples)

    transcriber._decoder = recorded
    names = ("silent", "short", "long", "broken", "long", "short", "short", "short", "short", "silent")
    clips = [clip if name == "short" else tmp_path / f"{name}.wav" for name in names]
    found = list(transcriber.transcripts(clips, Question("en")))
    assert len(found) == len(clips)
    assert [isinstance(result, RecordingError) for result in found] == [name == "broken" for name in names]
    ends = {"silent": 1.0, "short": 0.5, "long": 3.0}
    assert all(found[place].segments[-1].end_seconds == ends[names[place]] for place in range(10) if place != 3)
    assert asked == [[1, 3], [3, 1], [1, 1, 1]]


def test_transcribe_writes_files_for_a_folder(run, tiny_model, clip, tmp_path):
    recordings = tmp_path / "recordings"
    (recordings / "monday").mkdir(parents=True)
    shutil.copy(clip, recordings / "monday" / "first.wav")
    speech = np.concatenate([tone(3.0), np.zeros(16_000, dtype=np.int16), tone(3.0, seed=1)])
    soundfile.write(recordings / "second.flac", speech, 16_000)
    asked = ["--out", tmp_path / "out", "--format", "txt", "json", "srt", "--max-segment-seconds", "5"]
    assert run("transcribe", tiny_model, recordings, "--language", "en", *asked).code == 0
    written = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    assert written == [f"{name}.{suffix}" for name in ("monday/first", "second") for suffix in ("json", "srt", "txt")]
    row = json.loads((tmp_path / "out" / "second.json").read_text(encoding="utf-8"))
    first, second = row["segments"]
    assert 3.0 < first["end_seconds"] == second["start_seconds"] < 4.0, "cut in the pause"
    assert (tmp_path / "out" / "second.txt").read_text(encoding="utf-8") == f"{row['text']}\n"
    cue = f"2\n00:00:0{second['start_seconds']:.3f}".replace(".", ",") + " --> 00:00:07,000\n"
    assert cue in (tmp_path / "out" / "second.srt").read_text(encoding="utf-8")
    # What was written before is replaced, but never what is beside a recording: a human may have written it.
    assert run("transcribe", tiny_model, recordings, "--language", "en", *asked).code == 0
    (recordings / "second.txt").write_text("What was truly said.\n", encoding="utf-8")
    refused = run("transcribe", tiny_model, recordings, "--out", recordings).refusal()
    assert f"{recordings / 'second.txt'} is beside a recording and would be replaced" in refused
    assert (recordings / "second.txt").read_text(encoding="utf-8") == "What was truly said.\n"
    assert not (recordings / "monday" / "first.txt").exists(), "nothing was decoded before"
    assert run("transcribe", tiny_model, recordings, "--out", recordings, "--format", "json").code == 0
    # Beside any recording, by whatever path it is given.
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "second.flac").symlink_to(recordings / "second.flac")
    asked = [tmp_path / "linked", recordings / "monday" / "first.wav", "--out", recordings]
    assert "second.txt is beside a recording" in run("transcribe", tiny_model, *asked).refusal()
    assert (recordings / "second.txt").read_text(encoding="utf-8") == "What was truly said.\n"


def test_a_folder_with_the_name_of_a_clip_is_none(run, tiny_model, clip, tmp_path):
    (tmp_path / "recordings" / "archive.wav").mkdir(parents=True)
    shutil.copy(clip, tmp_path / "recordings" / "first.wav")
    result = run("transcribe", tiny_model, tmp_path / "recordings")
    assert (result.code, result.err) == (0, "")
    # But a link that leads nowhere is a recording that somebody misses.
    (tmp_path / "recordings" / "gone.wav").symlink_to(tmp_path / "nowhere.wav")
    result = run("transcribe", tiny_model, tmp_path / "recordings")
    assert result.code == 2
    assert "gone.wav cannot be read: No such file" in result.err


def test_the_name_of_a_clip_may_be_as_long_as_that_of_its_transcript_can_be(run, tiny_model, clip, tmp_path):
    long = clip.rename(clip.with_name(251 * "a" + ".wav"))
    assert run("transcribe", tiny_model, long, "--out", tmp_path / "out").code == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == [251 * "a" + ".txt"]
    refused = run("transcribe", tiny_model, long, "--out", tmp_path / "out", "--format", "json").refusal()
    assert "is longer than 255 bytes: rename the recording" in refused


def test_a_transcript_that_cannot_be_written_does_not_keep_the_others_from_it(run, tiny_model, clip, tmp_path):
    shutil.copy(clip, tmp_path / "first.wav")
    shutil.copy(clip, tmp_path / "second.wav")
    (tmp_path / "out" / "first.txt").mkdir(parents=True)
    result = run("transcribe", tiny_model, tmp_path / "first.wav", tmp_path / "second.wav", "--out", tmp_path / "out")
    assert result.code == 2
    assert "first cannot be written: Is a directory" in result.err
    assert "1 of 2 recordings could not be transcribed" in result.err
    assert len(result.out.splitlines()) == 2, "what was decoded is printed"
    assert (tmp_path / "out" / "second.txt").is_file()


def test_a_text_ends_no_cue_of_subtitles():
    segment = Segment(0.0, 1.5, "one\n\n2\n00:00:00,000 --> 00:00:09,000\ntwo")
    assert RecordingTranscript((segment, Segment(1.5, 2.0, ""))).to_srt() == (
        "1\n00:00:00,000 --> 00:00:01,500\none 2 00:00:00,000 --> 00:00:09,000 two\n\n"
    )
