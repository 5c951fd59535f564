"""Corpora as other tools write them: each utterance has its own text and audio, and nothing is lost without a word."""

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from written import (
    RATE,
    all_heard,
    clip,
    encoded,
    heard,
    hertz,
    lines_of,
    refusals,
    write,
    write_clip,
    write_rows,
    write_tar,
)

from voxtral_dist.data.stored.audio import decode_audio
from voxtral_dist.data.stored.checks import Cause
from voxtral_dist.data.stored.layout import Field, UtteranceLayout
from voxtral_dist.errors import UserError
from voxtral_dist.shards.corpus.fields import FieldNames
from voxtral_dist.shards.corpus.importers import importer_for
from voxtral_dist.shards.corpus.utterances import Refusal, Utterance

NUM_CLIPS = 5
EXPECTED = [(f"text {number}", number, 0.5) for number in range(NUM_CLIPS)]


# Formats


def ljspeech(folder: Path) -> Path:
    for number in range(NUM_CLIPS):
        write_clip(folder / "wavs" / f"LJ-{number}.wav", number)
    write(folder / "metadata.csv", "".join(f"LJ-{n}|text {n}|text number {n}\n" for n in range(NUM_CLIPS)))
    return folder


def ljspeech_without_normalized_text(folder: Path) -> Path:
    for number in range(NUM_CLIPS):
        write_clip(folder / f"{number}.wav", number)
    return write(folder / "train.txt", "".join(f"{n}.wav|text {n}\n" for n in range(NUM_CLIPS)))


def kaldi(folder: Path) -> Path:
    for number in range(NUM_CLIPS):
        write_clip(folder / "audio" / f"{number}.wav", number)
    data = folder / "data" / "train"
    write(data / "wav.scp", "".join(f"u{n} audio/{n}.wav\n" for n in range(NUM_CLIPS)))
    write(data / "text", "".join(f"u{n}\ttext {n}\n" for n in range(NUM_CLIPS)))
    write(data / "utt2lang", "".join(f"u{n} deu\n" for n in range(NUM_CLIPS)))
    write(data / "utt2spk", "".join(f"u{n} speaker-{n % 2}\n" for n in range(NUM_CLIPS)))
    return data


def kaldi_with_segments(folder: Path) -> Path:
    joined = np.concatenate([clip(number) for number in range(NUM_CLIPS)])
    write(folder / "data" / "rec.wav", encoded(joined))
    write(folder / "data" / "wav.scp", "rec rec.wav\n")
    ends = [*(0.5 * (n + 1) for n in range(NUM_CLIPS - 1)), -1]
    write(folder / "data" / "segments", "".join(f"u{n} rec {0.5 * n} {ends[n]}\n" for n in range(NUM_CLIPS)))
    write(folder / "data" / "text", "".join(f"u{n} text {n}\n" for n in range(NUM_CLIPS)))
    return folder / "data"


def shar_cut(key: str, number: int) -> dict[str, Any]:
    """A cut as Lhotse 1.32 writes it in Shar: its audio is a recording of its own, and a placeholder says so."""
    recording = {
        "id": f"rec-{number}",
        "sources": [{"type": "shar", "channels": [0], "source": ""}],
        "sampling_rate": RATE,
        "num_samples": RATE // 2,
        "duration": 0.5,
        "channel_ids": [0],
    }
    said = {"id": f"s{number}", "recording_id": f"rec-{number}", "start": 0.0, "duration": 0.5, "channel": 0}
    said |= {"text": f"text {number}", "language": "en", "speaker": "x"}
    cut = {"id": key, "start": 0, "duration": 0.5, "channel": 0, "supervisions": [said], "recording": recording}
    return cut | {"custom": {"topic": "t"}, "type": "MonoCut"}


def lhotse_shar(folder: Path) -> Path:
    # Ids with dots and slashes, as those of speed perturbation and of recordings in folders.
    keys = [f"a/rec-1_sp1.{number}" for number in range(NUM_CLIPS)]
    for shard, numbers in enumerate(((0, 1), (2, 3), (4,))):
        cuts = "".join(json.dumps(shar_cut(keys[n], n)) + "\n" for n in numbers)
        write(folder / f"cuts.{shard:06d}.jsonl.gz", gzip.compress(cuts.encode()))
        members: dict[str, bytes] = {}
        for n in numbers:
            members[f"{keys[n]}.flac"] = encoded(clip(n), "FLAC")
            members[f"{keys[n]}.json"] = json.dumps(shar_cut(keys[n], n)["recording"]).encode()
        write_tar(folder / f"recording.{shard:06d}.tar", members)
    return folder


def nemo_rows(numbers: Sequence[int], shard: int) -> list[dict[str, Any]]:
    return [
        {"audio_filepath": f"_data_{n}.wav", "duration": 0.5, "text": f"text {n}", "lang": "en", "shard_id": shard}
        for n in numbers
    ]


def nemo_tarred(folder: Path) -> Path:
    for shard, numbers in enumerate(((0, 1, 2), (3, 4))):
        write_tar(folder / f"audio_{shard}.tar", {f"_data_{n}.wav": encoded(clip(n)) for n in numbers})
    return write_rows(folder / "tarred_audio_manifest.json", nemo_rows((0, 1, 2), 0) + nemo_rows((3, 4), 1))


def nemo_tarred_folder(folder: Path) -> Path:
    return nemo_tarred(folder).parent


def nemo_tarred_pattern(folder: Path) -> str:
    nemo_tarred(folder)
    return f"{folder}/audio__OP_0..1_CL_.tar"


def nemo_sharded_manifests(folder: Path) -> str:
    nemo_tarred(folder).unlink()
    write_rows(folder / "sharded_manifests" / "manifest_0.json", nemo_rows((0, 1, 2), 0))
    write_rows(folder / "sharded_manifests" / "manifest_1.json", nemo_rows((3, 4), 1))
    return f"{folder}/sharded_manifests/manifest__OP_0..1_CL_.json"


def nemo_buckets(folder: Path) -> Path:
    for bucket, numbers in enumerate(((0, 1), (2, 3, 4)), 1):
        names = {f"_data_{n}.wav": encoded(clip(n)) for n in numbers}
        write_tar(folder / f"bucket{bucket}" / "audio_0.tar", names)
        write_rows(folder / f"bucket{bucket}" / "tarred_audio_manifest.json", nemo_rows(numbers, 0))
    return folder


def nemo_buckets_pattern(folder: Path) -> str:
    return f"{nemo_buckets(folder)}/bucket_OP_1..2_CL_/tarred_audio_manifest.json"


def audio_folder(folder: Path) -> Path:
    for number in range(NUM_CLIPS):
        write_clip(folder / "data" / f"{number}.wav", number)
    write(folder / "metadata.csv", "file_name,transcription\n" + "".join(f"data/{n}.wav,text {n}\n" for n in range(5)))
    return folder


def audio_folder_of_json(folder: Path) -> Path:
    audio_folder(folder)
    (folder / "metadata.csv").unlink()
    write_rows(folder / "metadata.jsonl", [{"file_name": f"data/{n}.wav", "text": f"text {n}"} for n in range(5)])
    return folder


def librispeech(folder: Path) -> Path:
    for number in range(NUM_CLIPS):
        write_clip(folder / "84" / "121123" / f"84-121123-{number:04d}.flac", number)
    texts = "".join(f"84-121123-{n:04d} text {n}\n" for n in range(NUM_CLIPS))
    write(folder / "84" / "121123" / "84-121123.trans.txt", texts)
    return folder


def yodas(folder: Path) -> Path:
    for part, numbers in enumerate(((0, 1, 2), (3, 4))):
        write(folder / "de000" / "text" / f"{part:08d}.txt", "".join(f"id-{n} text {n}\n" for n in numbers))
        tar = {f"./id-{n}.wav": encoded(clip(n)) for n in numbers}
        write_tar(folder / "de000" / "audio" / f"{part:08d}.tar.gz", tar)
    return folder / "de000"


def yodas_of_recordings(folder: Path) -> Path:
    said = {f"vid-0000{n}-{50 * n:08d}-{50 * n + 50:08d}": f"text {n}" for n in range(NUM_CLIPS)}
    write(folder / "en000" / "text" / "00000000.json", json.dumps([{"audio_id": "vid", "text": said}]))
    recording = encoded(np.concatenate([clip(n) for n in range(NUM_CLIPS)]))
    write_tar(folder / "en000" / "audio" / "00000000.tar.gz", {"vid.wav": recording})
    return folder / "en000"


def one_json_array(folder: Path) -> Path:
    for number in range(NUM_CLIPS):
        write_clip(folder / f"{number}.wav", number)
    rows = [{"audio": f"{n}.wav", "text": f"text {n}", "note": 'a "]},{ [', "deep": [[{}]]} for n in range(NUM_CLIPS)]
    return write(folder / "train.json", json.dumps(rows, indent=1))


def common_voice(folder: Path) -> Path:
    for number in range(NUM_CLIPS):
        write_clip(folder / "clips" / f"{number}.wav", number)
    rows = "".join(f"client\t{'clips/' * (n % 2)}{n}.wav\ttext {n}\tde\n" for n in range(NUM_CLIPS))
    return write(folder / "train.tsv", f"client_id\tpath\tsentence\tlocale\n{rows}")


def common_voice_1(folder: Path) -> Path:
    for number in range(NUM_CLIPS):
        write_clip(folder / "cv-valid-train" / f"sample-{number}.wav", number)
    rows = "".join(f"cv-valid-train/sample-{n}.wav,text {n},1,0,,,\n" for n in range(NUM_CLIPS))
    return write(folder / "cv-valid-train.csv", f"filename,text,up_votes,down_votes,age,gender,duration\n{rows}")


def common_voice_spontaneous(folder: Path) -> Path:
    for number in range(NUM_CLIPS):
        write_clip(folder / "audios" / f"spontaneous-{number}.wav", number)
    rows = "".join(f"c\t{n}\tspontaneous-{n}.wav\t500\ttext {n}\tde\n" for n in range(NUM_CLIPS))
    return write(
        folder / "ss-corpus-de.tsv", f"client_id\taudio_id\taudio_file\tduration_ms\ttranscription\tlanguage\n{rows}"
    )


def excel(folder: Path) -> Path:
    for number in range(NUM_CLIPS):
        write_clip(folder / f"{number}.wav", number)
    rows = "".join(f"{n}.wav;0,5;text {n};;\r\n" for n in range(NUM_CLIPS))
    return write(folder / "table.csv", f"\ufeffsep=;\r\nPath;Duration;Text;;\r\n{rows}")


def deepspeech(folder: Path) -> Path:
    for number in range(NUM_CLIPS):
        write_clip(folder / f"{number}.wav", number)
    rows = "".join(f"{folder}/{n}.wav,16044,text {n}\n" for n in range(NUM_CLIPS))
    return write(folder / "train.csv", f"wav_filename,wav_filesize,transcript\n{rows}")


def whisper_finetune(folder: Path) -> Path:
    write(folder / "long.wav", encoded(np.concatenate([clip(n) for n in range(NUM_CLIPS)])))
    rows = [
        {"audio": {"path": "long.wav", "start_time": 0.5 * n, "end_time": 0.5 * n + 0.5}, "sentence": f"text {n}"}
        for n in range(NUM_CLIPS)
    ]
    return write_rows(folder / "train.json", rows)


WRITERS: list[tuple[Callable[[Path], Path | str], str]] = [
    (ljspeech, "ljspeech"),
    (ljspeech_without_normalized_text, "ljspeech"),
    (kaldi, "kaldi"),
    (kaldi_with_segments, "kaldi"),
    (lhotse_shar, "lhotse_shar"),
    (nemo_tarred, "nemo_tarred"),
    (nemo_tarred_folder, "nemo_tarred"),
    (nemo_tarred_pattern, "nemo_tarred"),
    (nemo_sharded_manifests, "nemo_tarred"),
    (nemo_buckets, "nemo_tarred"),
    (nemo_buckets_pattern, "nemo_tarred"),
    (audio_folder, "audiofolder"),
    (audio_folder_of_json, "audiofolder"),
    (librispeech, "folder"),
    (yodas, "yodas"),
    (yodas_of_recordings, "yodas"),
    (one_json_array, "jsonl"),
    (common_voice, "tsv"),
    (common_voice_1, "csv"),
    (common_voice_spontaneous, "tsv"),
    (excel, "csv"),
    (deepspeech, "csv"),
    (whisper_finetune, "jsonl"),
]


@pytest.mark.parametrize(("writer", "name"), WRITERS, ids=lambda value: getattr(value, "__name__", ""))
def test_every_utterance_has_its_own_text_and_audio(tmp_path, writer: Callable[[Path], Path | str], name: str):
    source = writer(tmp_path / "set")
    assert importer_for(str(source), None).format == name
    assert all_heard(source) == EXPECTED
    keys = [line.key for line in lines_of(source)]
    assert len(set(keys)) == NUM_CLIPS


# Labels whose audio is elsewhere


def test_labels_find_their_audio_in_tars(tmp_path):
    tars = {f"de_train_0/common_voice_{n}.mp3": encoded(clip(n)) for n in (0, 1, 2)}
    write_tar(tmp_path / "audio" / "de_train_0.tar", tars)
    write_tar(tmp_path / "audio" / "de_train_1.tar.gz", {f"common_voice_{n}.mp3": encoded(clip(n)) for n in (3, 4)})
    rows = "".join(f"clips/common_voice_{n}.mp3\ttext {n}\tde\n" for n in reversed(range(NUM_CLIPS)))
    labels = write(tmp_path / "transcript" / "train.tsv", f"path\tsentence\tlocale\n{rows}")
    assert all_heard(labels, audio_from=str(tmp_path / "audio")) == EXPECTED


def test_labels_by_id_cut_recordings_in_tars(tmp_path):
    write_tar(tmp_path / "audio.tar.gz", {"x/video.wav": encoded(np.concatenate([clip(n) for n in range(NUM_CLIPS)]))})
    rows = [{"utt_id": "video", "offset": 0.5 * n, "duration": 0.5, "text": f"text {n}"} for n in range(NUM_CLIPS)]
    labels = write_rows(tmp_path / "labels.jsonl", rows)
    names = FieldNames.chosen("utt_id", None, None)
    assert all_heard(labels, audio_from=str(tmp_path / "audio.tar.gz"), names=names) == EXPECTED


def test_labels_without_audio_and_audio_without_labels_are_named(tmp_path):
    tar = {name: encoded(clip(1)) for name in ("a/1.wav", "b/1.wav", "only-audio.wav", "twice.wav", "t/twice.wav")}
    write_tar(tmp_path / "audio.tar", tar)
    names = ("a/1.wav", "c/1.wav", "twice.wav", "only-text.wav", "no-text.wav")
    rows = [{"audio": name, "text": name if name != "no-text.wav" else ""} for name in names]
    labels = write_rows(tmp_path / "labels.jsonl", rows)
    lines = lines_of(labels, audio_from=str(tmp_path / "audio.tar"))
    assert [line.text for line in lines if isinstance(line, Utterance)] == ["a/1.wav", "twice.wav"]
    found = [message for _, message in refusals(labels, audio_from=str(tmp_path / "audio.tar"))]
    assert [message.partition(" ")[2] for message in found] == [
        "utterance no-text.wav has no text: it needs one of the fields text, sentence, transcript, transcription",
        "audio b/1.wav may have one of several labels, whose names differ only in their folders",
        "audio only-audio.wav has no label of its name",
        "audio t/twice.wav is the second with this name: its label was used",
        f"utterance c/1.wav names no audio in {tmp_path}/audio.tar",
        f"utterance only-text.wav names no audio in {tmp_path}/audio.tar",
    ]


def test_a_folder_of_audio_is_named(tmp_path):
    for number in range(NUM_CLIPS):
        write_clip(tmp_path / "elsewhere" / "deep" / f"{number}.wav", number)
    rows = [{"audio": f"/home/other/set/deep/{n}.wav", "text": f"text {n}"} for n in range(NUM_CLIPS)]
    manifest = write_rows(tmp_path / "m" / "m.jsonl", rows)
    assert all_heard(manifest, audio_from=str(tmp_path / "elsewhere")) == EXPECTED
    with pytest.raises(UserError, match=r"The folder .*nowhere of `--audio-from` does not exist"):
        lines_of(manifest, audio_from=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="holds its audio: omit it"):
        lines_of(audio_folder(tmp_path / "folder"), audio_from=str(tmp_path))


# What Lhotse, NeMo and Kaldi do not say aloud


def test_a_shar_names_cuts_without_audio_and_audio_without_cuts(tmp_path):
    cuts = "".join(json.dumps(shar_cut(f"c{n}", n)) + "\n" for n in (0, 1))
    write(tmp_path / "cuts.000000.jsonl", cuts)
    members = {"c0.wav": encoded(clip(0)), "c0.json": b"{}", "c1.nodata": b"", "c1.nometa": b"", "c2.wav": b""}
    write_tar(tmp_path / "recording.000000.tar", members)
    assert [heard(line) for line in lines_of(tmp_path) if isinstance(line, Utterance)] == EXPECTED[:1]
    assert refusals(tmp_path) == [
        (Cause.EMPTY_TEXT, "the audio c2.wav has no cut of its id"),
        (Cause.NO_AUDIO, "the cut c1 has no audio in recording.000000.tar"),
    ]
    write(tmp_path / "cuts.000001.jsonl", cuts)
    with pytest.raises(UserError, match=r"lacks recording\.000001\.tar"):
        lines_of(tmp_path)


def cut_with(transforms: Sequence[Mapping[str, Any]], speed: float = 1.0) -> dict[str, Any]:
    """A cut of the third clip of a recording of three clips of 2 s: its times are those of the perturbed recording."""
    recording = {
        "id": "r",
        "sources": [{"type": "file", "channels": [0], "source": "rec.wav"}],
        "sampling_rate": RATE,
        "num_samples": round(6 * RATE / speed),
        "duration": 6 / speed,
        "transforms": list(transforms),
    }
    said = {"id": "s", "start": 0, "duration": 2 / speed, "text": "text 2", "language": "en"}
    cut = {"id": "c", "type": "MonoCut", "start": 4 / speed, "duration": 2 / speed, "channel": 0}
    return cut | {"supervisions": [said], "recording": recording}


@pytest.mark.parametrize(
    ("transforms", "speed", "gain"),
    [
        ([], 1.0, 1.0),
        ([{"name": "Speed", "kwargs": {"factor": 1.25}}], 1.25, 1.0),
        ([{"name": "Speed", "kwargs": {"factor": 0.9}}, {"name": "Volume", "kwargs": {"factor": 0.5}}], 0.9, 0.5),
        ([{"name": "Resample", "kwargs": {"source_sampling_rate": 16000, "target_sampling_rate": 8000}}], 1.0, 1.0),
    ],
)
def test_transforms_of_lhotse_are_applied(tmp_path, transforms, speed, gain):
    write(tmp_path / "rec.wav", encoded(np.concatenate([clip(n, 2.0) for n in range(3)])))
    manifest = write_rows(tmp_path / "cuts.jsonl", [cut_with(transforms, speed)])
    (line,) = lines_of(manifest)
    assert isinstance(line, Utterance)
    waveform = decode_audio(line.audio.found().read(), RATE)
    assert len(waveform) / RATE == pytest.approx(2 / speed, abs=0.01)
    middle = waveform[RATE // 2 :]
    assert np.abs(np.fft.rfft(middle[:RATE])).argmax() == pytest.approx(hertz(2) * speed, abs=2)
    assert np.abs(middle).max() == pytest.approx(8000 / 32768 * gain, rel=0.05)


def test_a_transform_that_is_not_applied_is_named(tmp_path):
    manifest = write_rows(tmp_path / "cuts.jsonl", [cut_with([{"name": "Tempo", "kwargs": {"factor": 0.9}}])])
    ((cause, message),) = refusals(manifest)
    assert cause == Cause.NO_AUDIO
    assert "the transform Tempo" in message


def test_rows_of_nemo_that_share_a_file_cut_it(tmp_path):
    members = {"_data_rec.wav": encoded(np.concatenate([clip(n) for n in range(3)]))}
    write_tar(tmp_path / "audio_0.tar", members)
    names = ["_data_rec.wav", "_data_rec-sub1.wav", "_data_rec-sub2.wav"]
    rows = [
        {"audio_filepath": name, "offset": 0.5 * n, "duration": 0.5, "text": f"text {n}", "shard_id": 0}
        for n, name in enumerate(names)
    ]
    assert all_heard(write_rows(tmp_path / "tarred_audio_manifest.json", rows)) == EXPECTED[:3]


def test_rows_and_tars_of_nemo_that_do_not_match_are_named(tmp_path):
    manifest = nemo_tarred(tmp_path)
    (tmp_path / "audio_1.tar").unlink()
    write_tar(tmp_path / "audio_0.tar", {f"_data_{n}.wav": encoded(clip(n)) for n in (0, 1, 3)})
    assert [heard(line) for line in lines_of(manifest) if isinstance(line, Utterance)] == EXPECTED[:2]
    assert [message for _, message in refusals(manifest)] == [
        "the utterance _data_3 is in the shard 1, which has no tar",
        "the utterance _data_4 is in the shard 1, which has no tar",
        "the audio _data_3.wav has no label of its name",
        "the utterance _data_2.wav names no audio in the tar of its shard",
    ]


def test_what_kaldi_pipes_or_archives_is_named(tmp_path):
    data = kaldi(tmp_path)
    scp = "u0 sph2pipe -f wav a.sph |\nu1 raw.ark:17\nu2 audio/2.wav\nu9 audio/4.wav\n"
    write(data / "wav.scp", scp)
    lines = lines_of(data)
    assert [(line.text, line.language) for line in lines if isinstance(line, Utterance)] == [("text 2", "de")]
    messages = [message for _, message in refusals(data)]
    assert [message[:60] for message in messages] == [
        "the utterance u0 cannot be read: its wav.scp entry is a command"[:60],
        "the utterance u1 cannot be read: its wav.scp entry is an archive"[:60],
        "the utterance u3 names no audio: u3 has no line in wav.scp",
        "the utterance u4 names no audio: u4 has no line in wav.scp",
        "the utterance u9 has no line in this file",
    ]
    write(data / "text", "u2 a\nu2 b\n")
    with pytest.raises(UserError, match="text:2: the id u2 is there twice"):
        lines_of(data)


def test_a_second_column_of_speakers_is_no_text(tmp_path):
    table = write(tmp_path / "train.txt", "".join(f"a{n}.wav|{n % 3}|text {n}\n" for n in range(NUM_CLIPS)))
    with pytest.raises(UserError, match="looks like speakers, not texts"):
        lines_of(table)
    lines = lines_of(table, columns=("audio", "speaker", "text"))
    assert [(line.text, line.extra) for line in lines if isinstance(line, Utterance)][4] == ("text 4", {"speaker": "1"})


def test_columns_that_are_named_are_those_of_a_header(tmp_path):
    table = write(tmp_path / "t.csv", "wav|words\na.wav|text 3\n")
    (line,) = lines_of(table, names=FieldNames.chosen("wav", "words", None))
    assert isinstance(line, Utterance)
    assert line.text == "text 3"


def test_the_other_text_of_ljspeech_is_chosen(tmp_path):
    lines = lines_of(ljspeech(tmp_path), names=FieldNames.chosen(None, "normalized_text", None))
    texts = [line.text for line in lines if isinstance(line, Utterance)]
    assert texts == [f"text number {number}" for number in range(NUM_CLIPS)]


def test_files_and_rows_of_an_audio_folder_that_do_not_match_are_named(tmp_path):
    audio_folder(tmp_path)
    write_clip(tmp_path / "data" / "more.wav", 0)
    write(tmp_path / "metadata.csv", "file_name,text\ndata/0.wav,text 0\ndata/1.wav,\ndata/9.wav,text 9\n")
    lines = lines_of(tmp_path)
    first, *_ = lines
    assert isinstance(first, Utterance)
    assert heard(first) == EXPECTED[0]
    named = [line.key for line in lines if isinstance(line, Refusal)]
    assert named == ["data_1", "data_2", "data_3", "data_4", "data_more"]


def test_splits_of_an_audio_folder_are_chosen(tmp_path):
    for split, number in (("train", 1), ("test", 2)):
        write_clip(tmp_path / split / "a.wav", number)
        write(tmp_path / split / "metadata.csv", f"file_name,text\na.wav,text {number}\n")
    with pytest.raises(UserError, match="several splits: pass one of them by --split: test, train"):
        lines_of(tmp_path)
    assert all_heard(tmp_path, split="test") == [EXPECTED[2]]
    with pytest.raises(UserError, match="is 'dev': it has test, train"):
        lines_of(tmp_path, split="dev")


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_emilia_and_other_tars_name_the_language_as_they_like(tmp_path, suffix):
    members: dict[str, bytes] = {}
    for number, (field, value) in enumerate([("language", "de"), ("locale", "fr-FR"), ("lang", "it"), ("x", "y")]):
        fields = {"id": f"DE_{number}", "text": f"text {number}", field: value, "duration": 0.5}
        members |= {f"DE_{number}.mp3": encoded(clip(number)), f"DE_{number}.json": json.dumps(fields).encode()}
    lines = lines_of(write_tar(tmp_path / f"DE-B000000{suffix}", members))
    assert [line.language for line in lines if isinstance(line, Utterance)] == ["de", "fr", "it", None]
    assert [heard(line) for line in lines if isinstance(line, Utterance)] == EXPECTED[:4]


def test_a_byte_order_mark_is_no_part_of_a_text_in_a_tar(tmp_path):
    members = {"a.wav": encoded(clip(0)), "a.txt": b"\xef\xbb\xbftext 0\r\n"}
    layout = UtteranceLayout(text=Field("txt"), language="en")
    assert all_heard(write_tar(tmp_path / "a.tar", members), layout=layout) == EXPECTED[:1]


# Whatever else is wrong


HOSTILE = {
    "tarred_audio_manifest.json": b'{"audio_filepath": ["a"], "shard_id": {}}\n[]\n{"shard_id": 0, "text": 5}\n',
    "text/0.json": b'[{"audio_id": 5, "text": ["x"]}, {"text": {"a-1-2": 7}}, {"text": {"a": "b"}}]',
    "text/0.txt": b"a \nb\n\n\0 \xff\n",
    "cuts.0.jsonl": b'{"id": ["a"]}\n7\n{"id": "a", "type": "MonoCut", "supervisions": 5}\n',
}
TARS = {"tarred_audio_manifest.json": "audio_0.tar", "cuts.0.jsonl": "recording.0.tar"}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_labels_are_refused_one_by_one(tmp_path, name):
    write(tmp_path / name, HOSTILE[name])
    write_tar(tmp_path / TARS.get(name, "audio/0.tar"), {"a.wav": encoded(clip(0))})
    assert len(refusals(tmp_path)) >= 3
    assert not [line for line in lines_of(tmp_path) if isinstance(line, Utterance)]


def test_hostile_lines_of_kaldi_are_refused_one_by_one(tmp_path):
    write(tmp_path / "wav.scp", "a /dev/null\nb\n")
    write(tmp_path / "segments", "a a 1\nb b 2 1\nc\n")
    write(tmp_path / "text", b"a x\nb\nc z\nd \xff\n")
    assert [cause for cause, _ in refusals(tmp_path)] == [Cause.MALFORMED] * 3 + [Cause.NO_AUDIO]
