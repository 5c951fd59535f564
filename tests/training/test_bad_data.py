"""A run over shards with one broken utterance in twenty, broken in every way that was met in practice."""

import json
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from voxtral_dist.data.examples.reader import UtteranceReader
from voxtral_dist.data.stored.index import ShardIndex, read_index
from voxtral_dist.data.stored.index_files import INDEX_FILE
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.data.stored.utterance import StoredUtterance, parse_utterance
from voxtral_dist.training.metrics_file import read_metrics

from corpora import pack_manifest, tone, write_lines
from runs import run_config, train_as_users_do
from stored import read_table, write_records, write_table

NUM_UTTERANCES = 200


def overwrite(offset: int, contents: bytes) -> Callable[[bytes], bytes]:
    """Audio with some bytes replaced."""
    return lambda audio: audio[:offset] + contents + audio[offset + len(contents) :]


def without_samples(audio: bytes) -> bytes:
    """Audio whose samples are a chunk of notes. A size of 0 before samples would be that of a recorder cut off."""
    return audio[:40] + struct.pack("<I4sI", 0, b"LIST", len(audio) - 52) + audio[52:]


def text(new: str) -> Callable[[bytes], bytes]:
    """The json of an utterance with another text, in as many bytes."""
    return lambda fields: json.dumps({"text": new, "lang": "en"}).encode().ljust(len(fields))


# Ways to break an utterance: the member, its change, and the expected complaint. Offsets are those of a WAV header.
BREAKAGES = {
    "undecodable": ("wav", overwrite(0, bytes(12)), "does not decode"),
    "silent": ("wav", lambda audio: audio[:44] + bytes(len(audio) - 44), "is silent"),
    "cut short": ("wav", overwrite(40, struct.pack("<I", 8000)), r"decodes to 0\.25 s of audio, but its index says"),
    "no samples": ("wav", without_samples, "contains no audio"),
    "claims 1 MHz": ("wav", overwrite(24, struct.pack("<I", 1_000_000)), "claims a sampling rate of 1000000 Hz"),
    "empty text": ("json", text(""), "has no text"),
    "impossible text": ("json", text("far too many words " * 25), "too short for a text of 475 characters"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Good clips in several shards; some are unusual: 48 kHz, stereo, 24-bit."""
    folder = tmp_path_factory.mktemp("bad-data")
    rows = []
    for number in range(NUM_UTTERANCES):
        rate = (16_000, 16_000, 48_000, 8_000)[number % 4]
        clip = tone(0.5 + number % 7 / 10, rate, seed=number)
        subtype = "PCM_24" if number % 10 == 9 else "PCM_16"
        waveform = np.stack([clip, clip], axis=1) if number % 10 == 3 else clip
        soundfile.write(folder / f"{number:03d}.wav", waveform, rate, subtype=subtype)
        rows.append(
            {"audio_filepath": f"{number:03d}.wav", "text": f"number {number}", "lang": "en", "note": "x" * 600}
        )
    pack_manifest(write_lines(folder / "manifest.jsonl", rows), folder / "whole", 600_000, skip_bad=False)
    return folder / "whole"


@pytest.fixture(scope="module")
def broken(whole, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A copy of the shards with broken utterances, and the expected complaint about each, by its key."""
    folder = tmp_path_factory.mktemp("bad-data") / "broken"
    index = read_index([shutil.copytree(whole, folder)])
    expected = {}
    # 16 kHz, 16-bit and mono, so that offsets and lengths are those of a plain WAV.
    plain = [utterance_id for utterance_id in range(0, NUM_UTTERANCES, 4) if utterance_id % 10 not in (3, 9)]
    for utterance_id, (member, change, sentence) in zip(plain, BREAKAGES.values(), strict=False):
        expected[rewrite(index, utterance_id, member, change)] = sentence
    refresh_checksums(folder, index)
    # And three that the index knows nothing of: flipped bits, a garbled header, a tar that ends early.
    flipped, garbled = plain[-1], plain[-2]
    expected[garble(index, flipped, 3000)] = "the checksum differs"
    garble(index, garbled, 100)
    expected[f"#{garbled}"] = "the checksum differs"
    expected[f"#{truncate_first_shard(folder, index)}"] = r"cannot be read at byte \d+"
    assert len(expected) == NUM_UTTERANCES // 20
    return folder, expected


def stored(index: ShardIndex, utterance_id: int) -> tuple[StoredUtterance, bytes]:
    contents = Storage().read(index.span(utterance_id))
    return parse_utterance(contents, index.layout(utterance_id)), contents


def rewrite(index: ShardIndex, utterance_id: int, member: str, change: Callable[[bytes], bytes]) -> str:
    """Change a member of a stored utterance without changing its length; return its key."""
    utterance, contents = stored(index, utterance_id)
    start = contents.index(b"RIFF") if member == "wav" else contents.index(b'{"text"')
    end = start + len(utterance.audio) if member == "wav" else contents.index(b"}", start) + 1
    changed = change(contents[start:end])
    assert len(changed) == end - start
    write_at(index, utterance_id, start, changed)
    return utterance.key


def garble(index: ShardIndex, utterance_id: int, offset: int) -> str:
    utterance, _ = stored(index, utterance_id)
    write_at(index, utterance_id, offset, b"\xff" * 200)
    return utterance.key


def write_at(index: ShardIndex, utterance_id: int, offset: int, contents: bytes) -> None:
    span = index.span(utterance_id)
    with Path(span.location).open("r+b") as tar:
        tar.seek(span.offset + offset)
        tar.write(contents)


def refresh_checksums(folder: Path, index: ShardIndex) -> None:
    """As if the index had been made of what is there now."""
    records = np.load(folder / INDEX_FILE)
    records["crc32"] = [zlib.crc32(Storage().read(index.span(utterance_id))) for utterance_id in range(len(index))]
    write_records(folder, records)


def truncate_first_shard(folder: Path, index: ShardIndex) -> int:
    """Cut the last utterance of the first shard in two, as a full disk does; return its number."""
    last = index.shards[0].num_utterances - 1
    span = index.span(last)
    num_bytes = span.offset + span.num_bytes // 2
    with Path(span.location).open("r+b") as tar:
        tar.truncate(num_bytes)
    table = read_table(folder)
    table["shards"][0]["num_bytes"] = num_bytes
    write_table(folder, table)
    return last


def test_a_run_finishes_and_names_every_broken_utterance_once_an_epoch(broken, tiny_model, tmp_path):
    folder, expected = broken
    config = run_config(tmp_path / "run", tiny_model, folder, num_steps=1000)
    train_data = {"slots_per_step": 4, "max_examples": 10, "max_bad_fraction": 0.1, "num_workers": 1}
    overrides = [f"train_data.{name}={value}" for name, value in train_data.items()]
    # 40 utterances a step: five steps are one epoch.
    ended = train_as_users_do(config, 2, "num_steps=5", *overrides)
    assert ended.code == 0, ended.output
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row.get("event") == "bad_utterance"]
    assert sorted(row["key"] for row in rows) == sorted(expected)
    for row in rows:
        assert_matches(row["reason"], expected[row["key"]])
        assert row["key"] in ended.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["num_bad_utterances"] == len(expected) == NUM_UTTERANCES // 20


def assert_matches(reason: str, pattern: str) -> None:
    assert re.search(pattern, reason), (reason, pattern)


def test_unusual_audio_is_not_broken(whole, prompts):
    index = read_index([whole])
    reader = UtteranceReader(index, prompts, 448)
    for utterance_id in range(len(index)):
        assert reader.example(utterance_id).duration_seconds == pytest.approx(0.5 + utterance_id % 7 / 10, abs=0.001)


def test_a_run_that_refuses_what_is_too_long_ends_on_all_ranks_when_reading_finds_it(whole, tiny_model, tmp_path):
    """The index counts with the published vocabulary; a tiny one makes more tokens of the same text."""
    config = run_config(tmp_path / "run", tiny_model, whole, num_steps=1000)
    ended = train_as_users_do(config, 2, "num_steps=5", "train_data.max_target_tokens=6", "train_data.too_long=refuse")
    assert ended.code == 2, ended.output
    assert ended.output.count("`train_data.too_long` is `refuse`, but step 1 has 8 utterances") == 1
    assert "too long for it: metrics.jsonl names each" in ended.output
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert any("more than the limit of 6" in row["reason"] for row in rows if row.get("event") == "bad_utterance")
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_what_is_too_long_is_skipped_and_is_no_sign_of_broken_data(whole, tiny_model, tmp_path):
    """Here all of it is, which is more than any limit of bad utterances allows."""
    config = run_config(tmp_path / "run", tiny_model, whole, num_steps=1000)
    limits = {"max_target_tokens": 7, "max_bad_fraction": 0, "slots_per_step": 4, "max_examples": 30}
    ended = train_as_users_do(
        config, 2, "num_steps=4", *(f"train_data.{name}={value}" for name, value in limits.items())
    )
    assert ended.code == 0, ended.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["num_too_long"] == summary["num_bad_utterances"] > 200
