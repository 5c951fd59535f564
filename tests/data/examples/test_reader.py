"""One stored utterance becomes one example, or a `UtteranceError` with shard and key; others are unaffected."""

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile

from voxtral_dist.data.examples.bad_utterance import UtteranceError
from voxtral_dist.data.examples.reader import UtteranceReader
from voxtral_dist.data.stored.audio import decode_audio, to_pcm
from voxtral_dist.data.stored.index import ShardIndex, read_index
from voxtral_dist.data.stored.index_files import INDEX_FILE
from voxtral_dist.data.stored.storage import Storage

from corpora import pack_manifest, tone, write_lines
from stored import write_records

RATE = 16_000


def test_an_example_is_the_utterance_as_the_model_takes_it(shard_index, prompts):
    reader = UtteranceReader(shard_index, prompts, 448)
    for utterance_id in range(len(shard_index)):
        utterance, example = reader.read(utterance_id), reader.example(utterance_id)
        waveform = to_pcm(decode_audio(utterance.audio, RATE))
        assert (example.utterance_id, example.key, example.reference) == (utterance_id, utterance.key, utterance.text)
        assert np.array_equal(example.pcm, waveform)
        assert example.prompt == prompts.transcription(utterance.language, example.num_windows)
        assert list(example.completion) == prompts.completion(utterance.text)
        assert example.duration_seconds == len(waveform) / RATE


@pytest.fixture
def copied(shard_folder, tmp_path) -> ShardIndex:
    """An index of copied tars for a test to damage without changing their size."""
    return read_index([shutil.copytree(shard_folder, tmp_path / "copied")])


def overwrite(index: ShardIndex, utterance_id: int, offset: int, contents: bytes) -> None:
    span = index.span(utterance_id)
    with Path(span.location).open("r+b") as tar:
        tar.seek(span.offset + offset)
        tar.write(contents)


def assert_others_are_unaffected(index: ShardIndex, prompts, damaged: int) -> None:
    reader = UtteranceReader(index, prompts, 448)
    for utterance_id in set(range(len(index))) - {damaged}:
        assert reader.example(utterance_id).utterance_id == utterance_id


def place_of(index: ShardIndex, utterance_id: int, pattern: bytes) -> int:
    return Storage().read(index.span(utterance_id)).index(pattern)


# Where a stored utterance with FLAC audio is damaged, and with what.
DAMAGES = {
    "first tar header": (lambda index: 0, bytes(600)),
    "checksum of the first tar header": (lambda index: 148, b"777777"),
    "name in a tar header": (lambda index: 0, b"\xff\xfe\xfd"),
    "json": (lambda index: place_of(index, 3, b'{"text"'), b"\x00\xff garbled \xff"),
    "json that is no object": (lambda index: place_of(index, 3, b'{"text"'), b'"text'),
    "audio header": (lambda index: place_of(index, 3, b"fLaC"), bytes(64)),
    "audio": (lambda index: place_of(index, 3, b"fLaC") + 1500, np.random.default_rng(0).bytes(800)),
    # The last bits of the number of samples and of their checksum: 2^36 - 1 samples are 256 GiB.
    "length in the audio header": (lambda index: place_of(index, 3, b"fLaC") + 22, b"\xff\xff\xff\xff"),
    "absurd length in the audio header": (lambda index: place_of(index, 3, b"fLaC") + 21, b"\xff\xff\xff\xff\xff"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_garbled_utterance_is_named_and_others_are_unaffected(copied, prompts, damage):
    place, contents = damage
    utterance = UtteranceReader(copied, prompts, 448).read(3)
    assert utterance.audio.startswith(b"fLaC")
    overwrite(copied, 3, place(copied), contents)
    with pytest.raises(UtteranceError) as caught:
        UtteranceReader(copied, prompts, 448).example(3)
    bad = caught.value.bad
    assert bad.shard == copied.shard(3).name
    # If the members cannot be read, the utterance's number replaces its key.
    assert bad.key in (utterance.key, "#3")
    assert bad.shard in str(caught.value)
    assert bad.key in str(caught.value)
    assert_others_are_unaffected(copied, prompts, damaged=3)


def test_a_truncated_tar_is_a_bad_utterance(copied, prompts):
    reader = UtteranceReader(copied, prompts, 448)
    last = copied.shards[0].num_utterances - 1
    span = copied.span(last)
    with Path(span.location).open("r+b") as tar:
        tar.truncate(span.offset + 700)
    with pytest.raises(UtteranceError, match=f"read 700 bytes instead of {span.num_bytes}"):
        reader.example(last)
    assert_others_are_unaffected(copied, prompts, damaged=last)


def packed(folder: Path, *rows: dict) -> Path:
    pack_manifest(write_lines(folder / "m.jsonl", list(rows)), folder / "packed", 10**9, skip_bad=False)
    return folder / "packed"


@pytest.fixture
def clip(tmp_path) -> dict:
    soundfile.write(tmp_path / "clip.wav", tone(2.0), RATE)
    return {"audio_filepath": "clip.wav", "text": "two seconds", "lang": "en"}


def test_truncated_audio_is_a_bad_utterance(tmp_path, clip, prompts):
    """The header still claims 2 s, and libsndfile decodes the rest without an error."""
    whole = (tmp_path / "clip.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[: len(whole) // 2])
    assert len(decode_audio((tmp_path / "cut.wav").read_bytes(), RATE)) < RATE * 1.01
    folder = packed(tmp_path, clip, clip | {"audio_filepath": "cut.wav"})
    records = np.load(folder / INDEX_FILE)
    # As in an index that was made before the file was truncated.
    records["duration_ms"] = 2000
    write_records(folder, records)
    reader = UtteranceReader(read_index([folder]), prompts, 448)
    assert reader.example(0).duration_seconds == 2.0
    with pytest.raises(UtteranceError, match=r"decodes to 1\.00 s of audio, but its index says 2\.00 s") as caught:
        reader.example(1)
    assert caught.value.bad.key == "cut"


def test_a_long_transcript_is_a_bad_utterance_and_never_truncated(tmp_path, clip, prompts):
    index = read_index([packed(tmp_path, clip)])
    completion = prompts.completion(clip["text"])
    assert UtteranceReader(index, prompts, len(completion)).example(0).completion == tuple(completion)
    sentence = f"has {len(completion)} target tokens, more than the limit of {len(completion) - 1}"
    with pytest.raises(UtteranceError, match=sentence):
        UtteranceReader(index, prompts, len(completion) - 1).example(0)


def with_fields(folder: Path, fields: object) -> ShardIndex:
    """The packed set with other fields in the JSON of its only utterance, as another tool may have written them."""
    index = read_index([folder])
    before = Storage().read(index.span(0))
    start = before.index(b'{"text"')
    old = before[start : before.index(b"}", start) + 1]
    new = json.dumps(fields).encode().ljust(len(old))
    assert len(new) == len(old)
    overwrite(index, 0, start, new)
    return with_new_checksums(folder)


def with_new_checksums(folder: Path) -> ShardIndex:
    """The index as if it were made after the tars changed."""
    index, records = read_index([folder]), np.load(folder / INDEX_FILE)
    records["crc32"] = [zlib.crc32(Storage().read(index.span(utterance_id))) for utterance_id in range(len(index))]
    write_records(folder, records)
    return read_index([folder])


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"lang": "en"}, "has no text"),
        ({"text": " "}, "has no text"),
        ({"text": 5}, "has no text"),
        ({"text": "a", "lang": "klingon"}, "'klingon'"),
        ({"text": "a", "lang": 5}, "language 5"),
        ({"text": "a", "lang": ["en"]}, "language"),
        ({"text": "a", "lang": {"a": 1}}, "language"),
        (["text"], "no JSON object"),
        (None, "no JSON object"),
    ],
)
def test_unusable_fields_are_a_bad_utterance(tmp_path, clip, prompts, fields, sentence):
    index = with_fields(packed(tmp_path, clip), fields)
    with pytest.raises(UtteranceError, match=sentence):
        UtteranceReader(index, prompts, 448).example(0)
