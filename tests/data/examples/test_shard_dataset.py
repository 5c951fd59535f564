"""Shards as a dataset: the utterances that training reads, by number, in any order, in worker processes too."""

import shutil

import numpy as np
import pytest
from torch.utils.data import DataLoader

from voxtral_dist.data.examples.bad_utterance import UtteranceError
from voxtral_dist.data.examples.reader import UtteranceReader
from voxtral_dist.data.examples.shard_dataset import ShardDataset
from voxtral_dist.data.stored.audio import to_pcm


@pytest.fixture
def rows(shard_folder) -> ShardDataset:
    return ShardDataset(str(shard_folder))


def test_rows_are_the_utterances_that_training_reads(rows, shard_index, prompts):
    reader = UtteranceReader(shard_index, prompts, None)
    assert len(rows) == len(shard_index) == len(list(rows))
    for number, row in enumerate(rows):
        loaded = reader.load(number)
        assert (row["key"], row["text"], row["language"]) == (loaded.key, loaded.text, loaded.language)
        assert np.array_equal(to_pcm(row["audio"]["array"]), loaded.pcm)


def test_audio_has_the_rate_that_was_asked_for(shard_folder, rows):
    at_8_khz = ShardDataset(str(shard_folder), sampling_rate=8_000)[0]["audio"]
    assert at_8_khz["sampling_rate"] == 8_000
    assert len(at_8_khz["array"]) == pytest.approx(len(rows[0]["audio"]["array"]) / 2, abs=1)


def test_worker_processes_read_the_same(rows):
    loader = DataLoader(rows, batch_size=None, num_workers=2)
    assert [row["text"] for row in loader] == [row["text"] for row in rows]


def test_there_is_no_row_behind_the_last(rows):
    for number in (-1, len(rows)):
        with pytest.raises(IndexError, match=f"no utterance {number}, only 0 to {len(rows) - 1}"):
            rows[number]


def test_a_damaged_utterance_is_named_when_it_is_asked_for(shard_folder, tmp_path):
    copied = shutil.copytree(shard_folder, tmp_path / "copied")
    tar = sorted(copied.glob("*.tar"))[0]
    contents = bytearray(tar.read_bytes())
    contents[600] ^= 0xFF
    tar.write_bytes(contents)
    rows = ShardDataset(str(copied))
    with pytest.raises(UtteranceError, match="the checksum differs"):
        rows[0]
    assert rows[1]["text"]
