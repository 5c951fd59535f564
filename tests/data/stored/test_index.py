"""The index of one or more shard folders, and what is refused before an utterance is read."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from voxtral_dist.data.examples.reader import UtteranceReader
from voxtral_dist.data.stored.index import read_index
from voxtral_dist.data.stored.index_files import INDEX_FILE, SHARD_TABLE_FILE
from voxtral_dist.data.stored.shard_set import RECORD
from voxtral_dist.errors import UserError

from corpora import SHARD_BYTES, pack_manifest, write_speech_manifest
from stored import read_table, write_table


@pytest.fixture
def copied(shard_folder, tmp_path) -> Path:
    """A copy of the shards for a test to damage."""
    return shutil.copytree(shard_folder, tmp_path / "copied")


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory) -> Path:
    """Shards whose languages come in another order: German first, then French, unknown and English."""
    folder = tmp_path_factory.mktemp("other")
    manifest = write_speech_manifest(folder, 9, max_seconds=0.8, seed=7)
    first, *others = manifest.read_text(encoding="utf-8").splitlines(keepends=True)
    manifest.write_text("".join([*others, first]), encoding="utf-8")
    pack_manifest(manifest, folder / "packed", SHARD_BYTES, skip_bad=False)
    return folder / "packed"


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as refused:
        read_index([folder])
    sentence = str(refused.value)
    assert str(folder) in sentence
    assert "\n" not in sentence
    return sentence


def test_spans_cover_the_tars_without_gaps(shard_index):
    spans = [shard_index.span(utterance_id) for utterance_id in range(len(shard_index))]
    for shard in shard_index.shards:
        inside = [span for span in spans if span.location == shard.location]
        assert len(inside) == shard.num_utterances
        assert inside[0].offset == 0
        ends = [span.offset + span.num_bytes for span in inside]
        assert [span.offset for span in inside[1:]] == ends[:-1]
        # After the last utterance there is only the end of the tar: zeros.
        contents = Path(shard.location).read_bytes()
        assert contents[ends[-1] :] == bytes(len(contents) - ends[-1])


def test_a_record_takes_24_bytes(shard_index):
    assert RECORD.itemsize == 24
    assert shard_index.records.nbytes == 24 * len(shard_index)


def test_two_folders_are_one_index_with_one_table_of_languages(shard_folder, other_folder, prompts):
    parts = [read_index([shard_folder]), read_index([other_folder])]
    assert parts[0].sets[0].languages != parts[1].sets[0].languages
    both = read_index([shard_folder, other_folder])
    readers = [(part, UtteranceReader(part, prompts, 448)) for part in parts]
    expected = [
        (part.language(utterance_id), reader.read(utterance_id), part.duration_seconds[utterance_id])
        for part, reader in readers
        for utterance_id in range(len(part))
    ]
    assert len(both) == len(expected)
    whole = UtteranceReader(both, prompts, 448)
    for utterance_id, (language, utterance, duration_seconds) in enumerate(expected):
        assert both.language(utterance_id) == language == utterance.language
        assert whole.read(utterance_id) == utterance
        assert both.duration_seconds[utterance_id] == duration_seconds


def test_one_folder_is_mapped_not_loaded(shard_index):
    assert isinstance(shard_index.sets[0].records, np.memmap)


@pytest.mark.parametrize("num_records", [1, 7, 100])
def test_chunks_are_all_records_of_all_sets(shard_folder, other_folder, num_records):
    both = read_index([shard_folder, other_folder])
    chunks = list(both.chunks(num_records))
    assert [chunk.first_id for chunk in chunks] == np.cumsum(
        [0, *(len(chunk.records) for chunk in chunks[:-1])]
    ).tolist()
    assert np.array_equal(np.concatenate([chunk.languages for chunk in chunks]), both.records["language"])
    for name in ("offset_blocks", "duration_ms", "crc32"):
        assert np.array_equal(np.concatenate([chunk.records[name] for chunk in chunks]), both.records[name])


def test_a_pattern_of_tars_takes_a_part_of_the_set(shard_folder, shard_index, prompts):
    taken = [shard_index.shards[0], shard_index.shards[-1]]
    part = read_index([shard.location for shard in taken])
    assert part.shards == tuple(taken)
    ids = [utterance_id for utterance_id in range(len(shard_index)) if shard_index.shard(utterance_id) in taken]
    whole, some = UtteranceReader(shard_index, prompts, 448), UtteranceReader(part, prompts, 448)
    assert [some.read(utterance_id) for utterance_id in range(len(part))] == [
        whole.read(utterance_id) for utterance_id in ids
    ]
    assert np.array_equal(part.records["crc32"], shard_index.gather(np.array(ids))["crc32"])


def test_a_tar_that_the_index_does_not_know_is_refused(copied):
    (copied / "other.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"shard other\.tar is not in the index"):
        read_index([str(copied / "other.tar")])


@pytest.mark.parametrize("num_utterances", [1, 5, 1000])
def test_first_keeps_the_order(shard_index, prompts, num_utterances):
    first = shard_index.first(num_utterances)
    assert len(first) == min(num_utterances, len(shard_index))
    last = len(first) - 1
    assert UtteranceReader(first, prompts, 448).read(last) == UtteranceReader(shard_index, prompts, 448).read(last)


def test_a_missing_folder_is_refused(tmp_path):
    assert "does not exist" in refusal(tmp_path / "nowhere")


def test_a_file_in_place_of_a_folder_is_refused(speech_manifest):
    refusal(speech_manifest)


def test_an_empty_folder_is_refused(tmp_path):
    assert "is empty" in refusal(tmp_path)


@pytest.mark.parametrize("file", [INDEX_FILE, SHARD_TABLE_FILE])
def test_a_folder_without_its_whole_index_is_refused(copied, file):
    (copied / file).unlink()
    assert "has no complete index" in refusal(copied)


def test_an_index_without_utterances_is_refused(copied):
    np.save(copied / INDEX_FILE, np.zeros(0, dtype=RECORD))
    assert "lists no utterances" in refusal(copied)


def test_an_index_of_other_shards_is_refused(copied, other_folder):
    shutil.copy(other_folder / INDEX_FILE, copied / INDEX_FILE)
    assert "do not belong together" in refusal(copied)


def test_an_index_of_another_layout_is_refused(copied):
    np.save(copied / INDEX_FILE, np.zeros(26, dtype=np.int64))
    assert "do not belong together" in refusal(copied)


def test_an_index_of_another_version_is_refused(copied):
    write_table(copied, read_table(copied) | {"format": 99})
    assert "has format 99, but this version reads format 4. Index the set again: `voxtral-dist shards index" in refusal(
        copied
    )


@pytest.mark.parametrize("contents", ["", "{", "[]", '{"format": 1}', '{"format": 1, "languages": [], "shards": [{}]}'])
def test_a_damaged_shard_table_is_refused(copied, contents):
    (copied / SHARD_TABLE_FILE).write_text(contents)
    refusal(copied)


def test_a_shard_table_with_one_flipped_bit_is_refused_or_the_same(copied, shard_folder):
    whole = (copied / SHARD_TABLE_FILE).read_bytes()
    (whole_set,) = read_index([str(shard_folder)]).sets
    for at in range(len(whole)):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 8
        (copied / SHARD_TABLE_FILE).write_bytes(flipped)
        with suppress(UserError):
            (found,) = read_index([str(copied)]).sets
            # White space, or one letter of another spelling of the same number.
            assert found.fingerprint == whole_set.fingerprint
            assert found.languages == whole_set.languages
            assert json.loads(flipped) == json.loads(whole)


def test_a_shard_table_of_the_format_without_a_checksum_is_read(copied, shard_index):
    table = {key: value for key, value in read_table(copied).items() if key != "checksum"}
    (copied / SHARD_TABLE_FILE).write_text(json.dumps(table | {"format": 3}))
    assert read_index([str(copied)]).sets[0].fingerprint == shard_index.sets[0].fingerprint


@pytest.mark.parametrize("num_bytes", [0, 5, 200])
def test_a_truncated_index_is_refused(copied, num_bytes):
    whole = (copied / INDEX_FILE).read_bytes()
    (copied / INDEX_FILE).write_bytes(whole[:num_bytes])
    refusal(copied)


@pytest.mark.parametrize("at", [-26 * 24, -300, -1])
def test_an_index_with_one_flipped_bit_is_refused(copied, at):
    contents = bytearray((copied / INDEX_FILE).read_bytes())
    contents[at] ^= 1
    (copied / INDEX_FILE).write_bytes(contents)
    assert "its records have another checksum than when they were written" in refusal(copied)


@pytest.mark.parametrize(
    "contents",
    [
        pytest.param(lambda whole: whole.replace(b"(26,)", b"(13,2)"), id="two dimensions"),
        pytest.param(lambda whole: whole.replace(b"(26,), }", b"(2**9,)}"), id="a formula"),
        pytest.param(lambda whole: whole.replace(b"(26,), } ", b"(-26,), }"), id="a negative number"),
        pytest.param(lambda _: b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535, id="nested braces"),
        pytest.param(lambda _: b"PK\x03\x04" + bytes(100), id="a damaged zip"),
        pytest.param(lambda _: b"\x80\x04N.", id="a pickle"),
    ],
)
def test_a_malformed_index_is_refused(copied, contents):
    whole = (copied / INDEX_FILE).read_bytes()
    assert contents(whole) != whole
    (copied / INDEX_FILE).write_bytes(contents(whole))
    refusal(copied)


@pytest.mark.parametrize(
    "change",
    [
        {"shards": 1},
        {"shards": [1]},
        {"languages": 5},
        {"languages": [None]},
        {"layout": []},
        {"layout": {"audio": 1}},
        {"longest_seconds": "x"},
        {"longest_seconds": float("nan")},
        {"most_text_tokens": 1e400},
        {"most_text_tokens": 10**30},
        {"records_sha256": None},
    ],
    ids=str,
)
def test_a_malformed_shard_table_is_refused(copied, change):
    write_table(copied, read_table(copied) | change)
    refusal(copied)


@pytest.mark.parametrize("name", ["location", "num_utterances", "num_bytes", "sha256"])
@pytest.mark.parametrize("value", [None, -1, 2**70, [], True], ids=str)
def test_a_malformed_shard_is_refused(copied, name, value):
    table = read_table(copied)
    table["shards"][0][name] = value
    write_table(copied, table)
    refusal(copied)


@pytest.mark.parametrize("contents", ["[" * 100_000, "1" * 5000, '"\\ud800"', "\x00"], ids=["nested", "digits", "", ""])
def test_a_hostile_shard_table_is_refused(copied, contents):
    (copied / SHARD_TABLE_FILE).write_text(contents)
    refusal(copied)


def test_a_missing_tar_is_refused(copied):
    tar = sorted(copied.glob("*.tar"))[-1]
    tar.unlink()
    assert tar.name in refusal(copied)


@pytest.mark.parametrize("change", [-512, 512])
def test_a_tar_of_another_size_is_refused(copied, change):
    tar = sorted(copied.glob("*.tar"))[0]
    contents = tar.read_bytes()
    tar.write_bytes(contents[:change] if change < 0 else contents + bytes(change))
    sentence = refusal(copied)
    assert tar.name in sentence
    assert f"has {len(contents) + change} bytes, but had {len(contents)}" in sentence
