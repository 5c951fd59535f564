"""Hugging Face datasets in the forms that users have them, without torchcodec."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from written import RATE, all_heard, clip, encoded, lines_of, refusals, write, write_clip, write_rows, write_tar

from voxtral_dist.data.stored.checks import Cause
from voxtral_dist.errors import UserError
from voxtral_dist.shards.corpus.fields import FieldNames

NUM_CLIPS = 3
TEXTS = [f"text {number}" for number in range(NUM_CLIPS)]
EXPECTED = [(text, number, 0.5) for number, text in enumerate(TEXTS)]
SAMPLES = [clip(number) / 2**15 for number in range(NUM_CLIPS)]


def parquet(path: Path, audio: list[Any], **columns: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"audio": audio, "text": TEXTS[: len(audio)]} | columns), path)
    return path


@pytest.mark.parametrize(
    "audio",
    [
        [{"bytes": encoded(clip(n)), "path": f"{n}.wav"} for n in range(NUM_CLIPS)],
        [encoded(clip(n)) for n in range(NUM_CLIPS)],
        [{"array": samples.tolist(), "path": None, "sampling_rate": RATE} for samples in SAMPLES],
        [{"array": [samples.tolist()] * 2, "sampling_rate": RATE} for samples in SAMPLES],
        [{"array": clip(n).tolist(), "sampling_rate": RATE} for n in range(NUM_CLIPS)],
    ],
    ids=["bytes and path", "bytes", "array", "two channels", "integers"],
)
def test_audio_of_each_form_is_read_from_a_parquet_file(tmp_path, audio):
    path = parquet(tmp_path / "set" / "train.parquet", audio)
    assert all_heard(path) == EXPECTED
    assert all_heard(path.parent) == EXPECTED
    assert all_heard(f"{path.parent}/*.parquet") == EXPECTED


@pytest.mark.parametrize(
    ("audio", "cause", "reason"),
    [
        ({"array": [0.1, 0.2], "sampling_rate": None}, Cause.NO_AUDIO, "an array, but its sampling_rate is None"),
        ({"array": [0.1, 20000.0], "sampling_rate": RATE}, Cause.MALFORMED, "that reaches 20000, far above 1"),
        ({"array": [0.1, float("nan")], "sampling_rate": RATE}, Cause.NOT_FINITE, "not finite"),
    ],
)
def test_an_array_that_is_no_audio_is_named(tmp_path, audio, cause, reason):
    ((found, message),) = refusals(parquet(tmp_path / "a.parquet", [audio]))
    assert found == cause
    assert reason in message


def test_an_array_keeps_its_samples(tmp_path):
    fine = np.round(np.linspace(-1, 1, 1000) * 2**23) / 2**23
    path = parquet(tmp_path / "a.parquet", [{"array": fine.tolist(), "sampling_rate": RATE}])
    (line,) = lines_of(path)
    import soundfile

    write(tmp_path / "a.flac", line.audio.read())
    np.testing.assert_allclose(soundfile.read(tmp_path / "a.flac")[0], fine, atol=1.01 / 2**23)


def test_an_audio_folder_and_a_web_dataset_are_read_through_datasets_without_torchcodec(tmp_path):
    folder = tmp_path / "folder"
    for number in range(NUM_CLIPS):
        write_clip(folder / "data" / f"{number}.wav", number)
    rows = [{"file_name": f"data/{n}.wav", "text": text} for n, text in enumerate(TEXTS)]
    write_rows(folder / "metadata.jsonl", rows)
    assert all_heard(folder, corpus_format="huggingface") == EXPECTED
    members: dict[str, bytes] = {}
    for number, text in enumerate(TEXTS):
        members |= {f"{number}.wav": encoded(clip(number)), f"{number}.txt": text.encode()}
    write_tar(tmp_path / "web" / "train-0.tar", members)
    names = FieldNames.chosen("wav", "txt", None)
    assert all_heard(tmp_path / "web", corpus_format="huggingface", names=names) == EXPECTED


def test_a_column_of_audio_is_read_from_a_saved_dataset(tmp_path):
    audio = [{"bytes": encoded(clip(n)), "path": f"{n}.wav"} for n in range(NUM_CLIPS)]
    made = datasets.Dataset.from_dict({"audio": audio, "text": TEXTS})
    made.cast_column("audio", datasets.Audio(decode=False)).save_to_disk(tmp_path / "set")
    assert all_heard(tmp_path / "set") == EXPECTED


def test_several_configurations_are_listed(tmp_path):
    audio = [{"bytes": encoded(clip(n)), "path": f"{n}.wav"} for n in range(NUM_CLIPS)]
    card = ["---", "configs:"]
    for name in ("fr", "de"):
        parquet(tmp_path / "set" / name / "train-0.parquet", audio)
        card += [f"- config_name: {name}", "  data_files:", "  - split: train", f"    path: {name}/train-*"]
    write(tmp_path / "set" / "README.md", "\n".join([*card, "---", ""]))
    with pytest.raises(UserError, match="has several configurations: pass one of them by --config: fr, de"):
        lines_of(tmp_path / "set")
    assert all_heard(tmp_path / "set", config="de") == EXPECTED


def test_times_of_rows_cut_recordings_and_leave_clips_whole(tmp_path):
    long = encoded(np.concatenate([clip(n) for n in range(NUM_CLIPS)]))
    audio = [{"bytes": long, "path": "a.wav"}] * 2 + [{"bytes": encoded(clip(2)), "path": "b.wav"}]
    path = parquet(tmp_path / "a.parquet", audio, start=[0.0, 0.5, 77.0], end=[0.5, 1.0, 77.5])
    assert all_heard(path) == EXPECTED
    path = parquet(tmp_path / "b.parquet", audio, offset=[0.0, 0.5, 77.0], duration=[0.5] * 3)
    assert all_heard(path) == EXPECTED


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    write(tmp_path / "train.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match=r"train\.parquet is a Git LFS pointer"):
        lines_of(tmp_path)


def test_labels_find_their_audio_in_a_dataset(tmp_path):
    audio = [{"bytes": encoded(clip(n)), "path": "x.wav"} for n in range(NUM_CLIPS)]
    path = parquet(tmp_path / "audio.parquet", audio, utt_id=[f"id-{n}" for n in range(NUM_CLIPS)])
    rows = [{"utt_id": f"id-{n}", "text": TEXTS[n]} for n in reversed(range(NUM_CLIPS))]
    labels = write_rows(tmp_path / "labels.jsonl", rows)
    names = FieldNames.chosen("utt_id", None, None)
    assert all_heard(labels, names=names, audio_from=str(path)) == EXPECTED
    pq.write_table(pa.table({"utt_id": ["id-1"], "text": ["text 1"]}), tmp_path / "labels.parquet")
    found = lines_of(tmp_path / "labels.parquet", names=names, audio_from=str(path))
    assert [getattr(line, "text", line.key) for line in found] == ["id-0", "text 1", "id-2"]
