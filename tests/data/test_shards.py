"""Packing: what goes in comes out, equal input makes equal bytes, and what cannot be used is named by file and line."""

import errno
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset
from webdataset.writer import TarWriter

from voxtral_dist.data.index import read_index
from voxtral_dist.data.samples import SampleReader
from voxtral_dist.data.shards import PackSummary, pack_manifest, read_manifest
from voxtral_dist.errors import UserError

from corpora import SHARD_BYTES, tone, write_lines

ALL = 10**9


def rows_of(manifest: Path) -> list[dict]:
    return [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]


def expected_fields(row: dict) -> dict:
    return {name: value for name, value in row.items() if name != "audio_filepath"}


@pytest.fixture
def clips(tmp_path) -> Path:
    """A folder with two good clips of half a second and a file that is no audio."""
    for number in (1, 2):
        soundfile.write(tmp_path / f"good{number}.wav", tone(0.5, seed=number), 16_000)
    (tmp_path / "notes.wav").write_text("this is no audio")
    (tmp_path / "empty.wav").touch()
    (tmp_path / "folder.wav").mkdir()
    return tmp_path


def good_row(number: int = 1) -> dict:
    return {"audio_filepath": f"good{number}.wav", "text": f"text {number}", "lang": "en"}


def test_packed_samples_read_back_as_they_were(speech_manifest, shard_index, prompts):
    reader = SampleReader(shard_index, prompts, max_target_tokens=448)
    rows = rows_of(speech_manifest)
    assert len(shard_index) == len(rows)
    for sample_id, row in enumerate(rows):
        sample = reader.read(sample_id)
        assert sample.audio == (speech_manifest.parent / row["audio_filepath"]).read_bytes()
        assert sample.fields == expected_fields(row)
        assert shard_index.language(sample_id) == row["lang"]


def test_webdataset_reads_the_same_samples_in_the_same_order(speech_manifest, shard_folder, shard_index):
    tars = sorted(map(str, shard_folder.glob("*.tar")))
    assert len(tars) == len(shard_index.shards) > 1
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    rows = rows_of(speech_manifest)
    assert len({sample["__key__"] for sample in samples}) == len(rows)
    for sample, row in zip(samples, rows, strict=True):
        suffix = Path(row["audio_filepath"]).suffix[1:]
        assert sample[suffix] == (speech_manifest.parent / row["audio_filepath"]).read_bytes()
        assert json.loads(sample["json"]) == expected_fields(row)


def test_a_shard_ends_with_the_sample_that_fills_it(shard_index):
    *full, last = shard_index.shards
    assert all(shard.num_bytes >= SHARD_BYTES for shard in full)
    # The largest sample is far smaller than a shard.
    assert all(shard.num_bytes < 1.5 * SHARD_BYTES for shard in [*full, last])


def test_equal_manifests_make_equal_bytes(speech_manifest, shard_folder, tmp_path):
    again = tmp_path / shard_folder.name
    pack_manifest(speech_manifest, again, SHARD_BYTES, skip_bad=False)
    names = sorted(path.name for path in shard_folder.iterdir())
    assert sorted(path.name for path in again.iterdir()) == names
    assert "index.npy" in names
    for name in names:
        assert (again / name).read_bytes() == (shard_folder / name).read_bytes(), name


def test_the_summary_counts_what_was_packed(clips):
    rows = [good_row(1), good_row(2) | {"lang": None}]
    summary = pack_manifest(write_lines(clips / "m.jsonl", rows), clips / "out", ALL, skip_bad=False)
    assert (summary.num_samples, summary.duration_seconds) == (2, 1.0)
    assert summary.languages == {"en": 1, "unknown": 1}
    assert summary.left_out == []


@pytest.mark.parametrize(
    "names",
    [
        ("audio_filepath", "text", "lang"),
        ("path", "sentence", "locale"),
        ("audio", "transcript", "language"),
    ],
)
def test_field_names_of_other_corpora_are_understood(clips, prompts, names):
    audio, text, language = names
    row = {audio: "good1.wav", text: "hello", language: "de", "speaker": "x"}
    pack_manifest(write_lines(clips / "m.jsonl", [row]), clips / "out", ALL, skip_bad=False)
    index = read_index([clips / "out"])
    sample = SampleReader(index, prompts, 448).read(0)
    assert sample.fields == {"text": "hello", "lang": "de", "speaker": "x"}
    assert index.language(0) == "de"


@pytest.mark.parametrize(
    "audio",
    ["deep/er/folder.with.dots/clip.one.wav", "Grüße 日本.wav", f"{'long' * 40}.wav", "UPPER.WAV"],
)
def test_any_file_name_can_be_packed(clips, prompts, audio):
    target = clips / audio
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(clips / "good1.wav", target)
    rows = [good_row(2), good_row() | {"audio_filepath": audio}, good_row(2)]
    pack_manifest(write_lines(clips / "m.jsonl", rows), clips / "out", ALL, skip_bad=False)
    index = read_index([clips / "out"])
    samples = [SampleReader(index, prompts, 448).read(sample_id) for sample_id in range(3)]
    assert samples[1].audio == target.read_bytes()
    streamed = list(webdataset.WebDataset([str(index.shards[0].path)], shardshuffle=False))
    assert [sample["__key__"] for sample in streamed] == [sample.key for sample in samples]


def test_repeated_audio_gets_keys_that_differ(clips, prompts):
    shutil.copy(clips / "good1.wav", clips / "good1-2.wav")
    rows = [good_row(), good_row(), good_row() | {"audio_filepath": "good1-2.wav"}, good_row()]
    pack_manifest(write_lines(clips / "m.jsonl", rows), clips / "out", ALL, skip_bad=False)
    reader = SampleReader(read_index([clips / "out"]), prompts, 448)
    keys = [reader.read(sample_id).key for sample_id in range(4)]
    assert len(set(keys)) == 4, keys


# Line 1 and line 3 of the manifest are good; this is line 2, and what the refusal says about it.
BAD_LINES = {
    "no text": ('{"audio_filepath": "good1.wav"}', "has no text"),
    "blank text": ('{"audio_filepath": "good1.wav", "text": "  "}', "has no text"),
    "number as text": ('{"audio_filepath": "good1.wav", "text": 7}', "has no text"),
    "no audio": ('{"text": "hello"}', "names no audio"),
    "no JSON": ('{"audio_filepath": ', "not valid JSON"),
    "no object": ('["good1.wav", "hello"]', "not a JSON object"),
    "missing audio": ('{"audio_filepath": "nowhere.wav", "text": "hello"}', "nowhere.wav cannot be read: No such file"),
    "audio is a folder": ('{"audio_filepath": "folder.wav", "text": "hello"}', "folder.wav cannot be read"),
    "text as audio": ('{"audio_filepath": "notes.wav", "text": "hello"}', "notes.wav does not decode"),
    "empty audio": ('{"audio_filepath": "empty.wav", "text": "hello"}', "empty.wav does not decode"),
    "language is no text": ('{"audio_filepath": "good1.wav", "text": "hello", "lang": {"code": "en"}}', "lang"),
}


@pytest.fixture(params=BAD_LINES.values(), ids=BAD_LINES.keys())
def bad_manifest(request, clips) -> tuple[Path, str]:
    line, sentence = request.param
    manifest = clips / "m.jsonl"
    manifest.write_text("\n".join([json.dumps(good_row(1)), line, json.dumps(good_row(2)), ""]))
    return manifest, sentence


def test_a_bad_line_is_refused_by_file_and_line(bad_manifest, tmp_path):
    manifest, sentence = bad_manifest
    with pytest.raises(UserError) as refused:
        pack_manifest(manifest, tmp_path / "out", ALL, skip_bad=False)
    assert str(refused.value).startswith(f"{manifest}:2: ")
    assert sentence in str(refused.value)
    assert "--skip-bad" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert list((tmp_path / "out").iterdir()) == [], "a refused set leaves nothing that looks like one"


def test_with_skip_bad_a_bad_line_is_left_out_and_counted(bad_manifest, tmp_path, prompts):
    manifest, sentence = bad_manifest
    summary = pack_manifest(manifest, tmp_path / "out", ALL, skip_bad=True)
    assert summary.num_samples == 2
    assert len(summary.left_out) == 1
    assert summary.left_out[0].startswith(f"{manifest}:2: ")
    assert sentence in summary.left_out[0]
    assert "left out 1" in "\n".join(summary.lines())
    reader = SampleReader(read_index([tmp_path / "out"]), prompts, 448)
    assert [reader.read(sample_id).key for sample_id in range(2)] == ["good1", "good2"]


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_full_disk_is_not_taken_for_bad_audio(clips, monkeypatch, skip_bad):
    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TarWriter, "write", no_space)
    manifest = write_lines(clips / "m.jsonl", [good_row(1), good_row(2)])
    with pytest.raises((OSError, UserError), match="No space left") as refused:
        pack_manifest(manifest, clips / "out", ALL, skip_bad)
    assert "the audio" not in str(refused.value)


def test_a_manifest_that_is_not_utf8_is_refused(clips):
    (clips / "m.jsonl").write_bytes('{"audio_filepath": "good1.wav", "text": "é"}\n'.encode("latin-1"))
    with pytest.raises(UserError, match=r"m\.jsonl"):
        pack_manifest(clips / "m.jsonl", clips / "out", ALL, skip_bad=False)


def test_a_missing_manifest_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jsonl does not exist"):
        pack_manifest(tmp_path / "nowhere.jsonl", tmp_path / "out", ALL, skip_bad=False)


@pytest.mark.parametrize("contents", ["", "\n \n", '{"audio_filepath": "notes.wav", "text": "hello"}\n'])
def test_a_manifest_of_nothing_usable_makes_no_set(clips, contents):
    (clips / "m.jsonl").write_text(contents)
    with pytest.raises(UserError, match="Nothing was packed"):
        pack_manifest(clips / "m.jsonl", clips / "out", ALL, skip_bad=True)
    assert list((clips / "out").iterdir()) == []


def test_a_complete_set_is_never_overwritten(clips):
    manifest = write_lines(clips / "m.jsonl", [good_row()])
    pack_manifest(manifest, clips / "out", ALL, skip_bad=False)
    before = {path.name: path.read_bytes() for path in (clips / "out").iterdir()}
    with pytest.raises(UserError, match="holds a complete shard set already"):
        pack_manifest(manifest, clips / "out", ALL, skip_bad=False)
    assert {path.name: path.read_bytes() for path in (clips / "out").iterdir()} == before


def test_blank_lines_of_a_manifest_are_not_counted_as_samples(clips):
    (clips / "m.jsonl").write_text(f"\n{json.dumps(good_row(1))}\n\n{json.dumps(good_row(2))}\n")
    assert [utterance.place.rpartition(":")[2] for utterance in read_manifest(clips / "m.jsonl")] == ["2", "4"]


def test_an_empty_summary_says_so():
    assert list(PackSummary().lines()) == ["0 utterances, 0.00 h, languages: "]


def test_durations_are_those_of_the_audio_at_its_own_rate(speech_manifest, shard_index):
    rows = rows_of(speech_manifest)
    measured = [soundfile.info(str(speech_manifest.parent / row["audio_filepath"])).duration for row in rows]
    np.testing.assert_allclose(shard_index.duration_seconds, measured, atol=0.001)


def test_tar_members_carry_no_extended_headers(shard_folder: Path) -> None:
    for path in shard_folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            assert [member.pax_headers for member in tar] == [{}] * len(tar.getmembers())
