"""One hostile line, member or file never ends a whole command, and memory depends on what is there, not on claims."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile

from voxtral_dist.data.stored import tar_members
from voxtral_dist.data.stored.audio import AudioError, decode_audio, decode_pcm, resample, to_pcm
from voxtral_dist.data.stored.checks import UnusableError
from voxtral_dist.data.stored.index import read_index
from voxtral_dist.data.stored.layout import UtteranceLayout
from voxtral_dist.errors import UserError
from voxtral_dist.shards.corpus import manifest_lines
from voxtral_dist.shards.corpus.audio_location import AudioLocation, encode_flac
from voxtral_dist.shards.corpus.corpus import open_corpus
from voxtral_dist.shards.corpus.importers import importer_for
from voxtral_dist.shards.corpus.options import CorpusOptions
from voxtral_dist.shards.corpus.utterances import Refusal, Utterance, key_of
from voxtral_dist.shards.indexing import index_tars
from voxtral_dist.shards.packing import PackOptions, pack
from voxtral_dist.shards.skipped import SKIPPED_FILE
from voxtral_dist.shards.tars.members import Member, TarDamage, TarReader, read_members
from voxtral_dist.shards.tars.writing import tar_end, utterance_bytes
from voxtral_dist.text.json_text import MAX_NESTING, parse_json

from corpora import tone
from hostile import PAX_RECORDS, claiming, flac, hostile_lines, nested, pax_member, pax_record

MIB = 2**20
GOOD = b'{"audio_filepath": "good.wav", "text": "one two"}'


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """The peak of what Python and numpy allocate in the block, in bytes."""
    peaks: list[int] = []
    tracemalloc.start()
    try:
        yield peaks
    finally:
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A manifest of hostile lines between good ones."""
    soundfile.write(tmp_path / "good.wav", tone(0.3), 16_000)
    lines = [part for line in hostile_lines(tmp_path) for part in (line, GOOD)]
    (tmp_path / "manifest.jsonl").write_bytes(b"\n".join(lines))
    return tmp_path / "manifest.jsonl"


def test_hostile_lines_are_skipped_and_good_ones_packed(corpus, tmp_path):
    num_lines = len(corpus.read_bytes().split(b"\n"))
    summary = pack(open_corpus(str(corpus), CorpusOptions()), tmp_path / "out", PackOptions(skip_bad=True))
    assert summary.num_utterances == num_lines // 2
    rows = [json.loads(line) for line in (tmp_path / "out" / SKIPPED_FILE).read_bytes().splitlines()]
    places = [int(row["place"].rpartition(":")[2]) for row in rows]
    assert places == list(range(1, num_lines, 2))
    assert all(row["reason"] and len(row["reason"]) < 2000 for row in rows)
    # What nobody foresaw is named by its type; here, everything is foreseen.
    assert [
        row["reason"] for row in rows if "Error" in row["reason"] and "is not a valid cut" not in row["reason"]
    ] == []


def test_each_hostile_line_alone_is_one_message(corpus, tmp_path):
    for line in hostile_lines_only(corpus):
        (tmp_path / "one.jsonl").write_bytes(line)
        with pytest.raises(UserError) as refused:
            pack(open_corpus(str(tmp_path / "one.jsonl"), CorpusOptions()), tmp_path / "one", PackOptions())
        assert "\n" not in str(refused.value)


def hostile_lines_only(corpus: Path) -> list[bytes]:
    return corpus.read_bytes().split(b"\n")[::2]


def test_lines_can_be_sent_to_workers(corpus):
    for line in lines_of(corpus):
        assert pickle.loads(pickle.dumps(line)) == line


def lines_of(path: Path) -> list[Utterance | Refusal]:
    return list(importer_for(str(path), None).open(str(path), CorpusOptions()).read())


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv"])
def test_a_line_that_is_too_long_is_skipped(tmp_path, monkeypatch, name):
    monkeypatch.setattr(manifest_lines, "LARGEST_LINE_BYTES", 1000)
    header, good = (b"path,text\n", b"a.wav,one\n") if name == "t.csv" else (b"", GOOD + b"\n")
    (tmp_path / name).write_bytes(header + good + b"x" * 5000 + b"\n" + good + b"y" * 2000)
    found = lines_of(tmp_path / name)
    assert [isinstance(line, Utterance) for line in found] == [True, False, True, False]
    first = found[1]
    assert isinstance(first, Refusal)
    assert first.place.endswith(f"{name}:{2 + bool(header)}")


def test_a_compressed_line_of_zeros_takes_little_memory(tmp_path):
    with gzip.open(tmp_path / "t.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(40):
            file.write(bytes(2 * MIB))
        file.write(b"\n" + GOOD + b"\n")
    with peak_memory() as peaks:
        found = lines_of(tmp_path / "t.jsonl.gz")
    assert [isinstance(line, Utterance) for line in found] == [False, True]
    assert peaks[0] < 50 * MIB


@pytest.mark.parametrize("damage", ["cut", "flipped", "no gzip"])
def test_lines_before_damaged_compression_are_kept(tmp_path, damage):
    rng = np.random.default_rng(0)
    lines = b"".join(GOOD[:-1] + b', "x": "%d"}\n' % rng.integers(2**62) for _ in range(5000))
    contents = bytearray(gzip.compress(lines))
    if damage == "flipped":
        contents[len(contents) // 2] ^= 255
    else:
        contents = contents[: len(contents) // 2] if damage == "cut" else bytearray(lines)
    (tmp_path / "t.jsonl.gz").write_bytes(contents)
    *good, last = lines_of(tmp_path / "t.jsonl.gz")
    assert isinstance(last, Refusal)
    assert "the manifest ends here: its compressed data is damaged" in last.message
    assert bool(good) == (damage != "no gzip")


def test_a_table_with_hostile_rows_keeps_the_others(tmp_path):
    rows = [b'a.wav,"one', b'two"', b"b.wav,caf\xe9", b"c.wav,x,y", b"\0,\0", b"d.wav,one", b".,one"]
    (tmp_path / "t.csv").write_bytes(b"path,text\n" + b"\n".join(rows) + b'\n"unclosed')
    found = lines_of(tmp_path / "t.csv")
    assert [line.key for line in found if isinstance(line, Utterance)] == ["a", "_", "d", "_"]


@pytest.mark.parametrize("contents", [b"\0" * 100, b'"' * 7, b"\xff\xfep\0", b'path,text\r\r\n"' + b"a" * 100])
def test_a_hostile_table_is_a_message_or_refusals(tmp_path, contents):
    (tmp_path / "t.csv").write_bytes(contents)
    with suppress(UserError):
        assert all(isinstance(line, Refusal) for line in lines_of(tmp_path / "t.csv"))


@pytest.mark.parametrize("name", ["", ".", "..", "/", "///", "a/..", "\0", "s3://", "\udcff", "x" * 10**6, "é.wav"])
def test_every_name_has_a_key(name):
    key = key_of(name)
    assert 0 < len(key) < 5000
    key.encode("utf-8")
    assert not {"/", "."} & set(key)


# --- JSON ---


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (nested(MAX_NESTING + 1), "too deeply nested"),
        ('{"a":' * (MAX_NESTING + 1) + "1" + "}" * (MAX_NESTING + 1), "too deeply nested"),
        (nested(100_000), "too deeply nested"),
        ("1" * 5000, "a number has too many digits"),
        ("-" + "1" * 5000, "a number has too many digits"),
        ("{", "Expecting property name"),
        (b"\xff", "not UTF-8"),
        (b"\xff\xfe\x00", "."),
    ],
    ids=range(8),
)
def test_json_that_cannot_be_used_is_one_kind_of_error(text, why):
    with pytest.raises(ValueError, match=why):
        parse_json(text)


def test_flat_and_nested_json_is_read():
    assert parse_json(nested(MAX_NESTING)) == json.loads(nested(MAX_NESTING))
    wide = json.dumps([{"a": [number]} for number in range(1000)])
    assert parse_json(wide) == parse_json(wide.encode()) == json.loads(wide)


# --- audio ---


def test_a_claimed_length_asks_for_no_memory():
    contents = claiming(flac(96_000, rate=96_000, num_channels=8), int(5.9 * 3600 * 96_000))
    assert soundfile.info(io.BytesIO(contents)).frames == int(5.9 * 3600 * 96_000)
    with peak_memory() as peaks:
        for decode in (decode_pcm, decode_audio):
            with pytest.raises(AudioError, match="does not decode"):
                decode(contents, 16_000)
    assert peaks[0] < 40 * MIB


def test_a_part_of_a_claimed_length_asks_for_no_memory(tmp_path):
    (tmp_path / "a.flac").write_bytes(claiming(flac(96_000, rate=96_000, num_channels=8), int(5.9 * 3600 * 96_000)))
    with peak_memory() as peaks, pytest.raises(AudioError, match="does not decode"):
        AudioLocation(str(tmp_path / "a.flac"), None, 0.25, 20_000.0, 3).read()
    assert peaks[0] < 40 * MIB


def test_silence_that_decompresses_takes_no_more_than_its_samples():
    contents = flac(2 * 60 * 48_000, rate=48_000, num_channels=2, is_silent=True)
    assert len(contents) < MIB / 4
    with peak_memory() as peaks:
        assert len(decode_pcm(contents, 16_000)) == 2 * 60 * 16_000
    assert peaks[0] < 1.3 * 2 * 2 * 60 * 16_000 + 30 * MIB


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
@pytest.mark.parametrize("num_channels", [1, 2])
def test_audio_of_many_blocks_is_that_of_one_read(monkeypatch, rate, num_channels):
    samples = np.stack([tone(2.5, rate, seed) for seed in range(num_channels)], axis=1)
    contents = encode_flac(samples, rate, "PCM_16")
    whole, pcm = decode_audio(contents, 16_000), decode_pcm(contents, 16_000)
    monkeypatch.setattr("voxtral_dist.data.stored.audio_source._BLOCK_SAMPLES", 1000)
    assert np.array_equal(decode_audio(contents, 16_000), whole)
    assert np.array_equal(decode_pcm(contents, 16_000), pcm)
    mono = (samples / np.float32(32768)).astype(np.float32).mean(axis=1)
    assert np.array_equal(whole, resample(mono, rate, 16_000))
    assert np.array_equal(pcm, to_pcm(whole))


def test_a_part_written_in_blocks_has_the_bytes_of_one_write(tmp_path, monkeypatch):
    samples = np.stack([tone(2.5, 44_100, seed) for seed in range(2)], axis=1)
    soundfile.write(tmp_path / "a.wav", samples, 44_100)
    monkeypatch.setattr("voxtral_dist.data.stored.audio_source._BLOCK_SAMPLES", 1000)
    part = AudioLocation(str(tmp_path / "a.wav"), None, 0.5, 1.0).read()
    assert part == encode_flac(samples[22_050:66_150], 44_100, "PCM_16")
    channel = AudioLocation(str(tmp_path / "a.wav"), None, 0.5, None, 1).read()
    assert channel == encode_flac(samples[22_050:, 1], 44_100, "PCM_16")


@pytest.mark.parametrize("contents", [b"", b"fLaC", b"RIFF\xff\xff\xff\xffWAVE", b"OggS" + bytes(100), bytes(1000)])
def test_what_is_no_audio_is_unusable(contents):
    with pytest.raises(AudioError):
        decode_pcm(contents, 16_000)
    with pytest.raises(UnusableError):
        AudioLocation("a.wav", contents, 0.5).read()


# --- tars ---


def good_utterance(key: str) -> bytes:
    return utterance_bytes(key, {"flac": flac(8000), "json": b'{"text": "one", "lang": "en"}'})


def test_numbers_of_many_digits_in_a_tar_take_no_time():
    """Regular expressions of Python's tarfile take hours for them before 3.11.10 and 3.12.6."""
    contents = pax_member(pax_record("GNU.sparse.size", "9" * 10**6))
    with pytest.raises(ValueError, match="a number of more than 300 digits"):
        tar_members.read_members(contents)
    tar = contents + good_utterance("good")
    damage, *members = read_members(TarReader(io.BytesIO(tar), len(tar)), "a.tar")
    assert isinstance(damage, TarDamage)
    assert "a number of more than 300 digits" in str(damage)
    assert [one.name for one in members if isinstance(one, Member)][-2:] == ["good.flac", "good.json"]


def write_tar(path: Path, *parts: bytes) -> Path:
    body = b"".join(parts)
    path.write_bytes(body + tar_end(len(body)))
    return path


@pytest.mark.parametrize("records", PAX_RECORDS, ids=range(len(PAX_RECORDS)))
def test_crafted_extended_headers_lose_only_their_member(tmp_path, records):
    write_tar(tmp_path / "a.tar", good_utterance("before"), pax_member(records), good_utterance("after"))
    summary = index_tars(str(tmp_path), None, UtteranceLayout(), 40.0, 1)
    assert summary.num_utterances == 2


@pytest.mark.parametrize(
    "member",
    [
        {"json": b"[" * 100_000, "flac": flac(8000)},
        {"json": b'{"text": "a", "x": ' + b"1" * 5000 + b"}", "flac": flac(8000)},
        {"json": b'{"text": 5}', "flac": flac(8000)},
        {"json": b'{"text": "a", "lang": {}}', "flac": flac(8000)},
        {"json": b'{"text": "a"}', "flac": b"fLaC"},
        {"json": b'{"text": "a"}', "flac": claiming(flac(160, rate=96_000, num_channels=8), 7 * 3600 * 96_000)},
        {"json": b'{"text": "a"}', "wav": b"RIFF", "flac": flac(8000)},
    ],
    ids=range(7),
)
def test_a_hostile_utterance_of_a_tar_is_the_only_one_skipped(tmp_path, member):
    parts = good_utterance("before"), utterance_bytes("hostile", member), good_utterance("x")
    write_tar(tmp_path / "a.tar", *parts)
    summary = index_tars(str(tmp_path), None, UtteranceLayout(), 40.0, 1)
    assert (summary.num_utterances, summary.skipped.count) == (2, 1)
    assert len(read_index([str(tmp_path)])) == 2
    packed = pack(open_corpus(str(tmp_path / "a.tar"), CorpusOptions()), tmp_path / "out", PackOptions(skip_bad=True))
    assert (packed.num_utterances, packed.skipped.count) == (2, 1)


def found_in(contents: bytes, largest_bytes: int) -> list[str | None]:
    """The names of members; None for damage."""
    reader = TarReader(io.BytesIO(contents), None, largest_bytes)
    return [found.name if isinstance(found, Member) else None for found in read_members(reader, "a.tar")]


def test_a_member_above_the_limit_is_skipped_without_being_held(tmp_path):
    inner = write_tar(tmp_path / "inner.tar", good_utterance("inside"))
    large = utterance_bytes("large", {"bin": inner.read_bytes() + bytes(20 * MIB)})
    contents = good_utterance("a") + large + good_utterance("b") + tar_end(0)
    with peak_memory() as peaks:
        found = found_in(contents, 2 * MIB)
    # The tar inside of the member is not taken for members of this one.
    assert found == ["a.flac", "a.json", None, "b.flac", "b.json"]
    assert peaks[0] < 10 * MIB


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_extended_headers_are_limited_together(kind):
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, 300 * 1024
    one = header.tobuf(tarfile.USTAR_FORMAT) + bytes(header.size)
    contents = one * 8 + good_utterance("a")
    assert found_in(contents + tar_end(len(contents)), 64 * MIB)[-1] == "a.json"


def test_members_of_an_utterance_are_limited_together(tmp_path):
    many = b"".join(utterance_bytes("a", {f"x{number}": b"1"}) for number in range(1000))
    write_tar(tmp_path / "a.tar", many, good_utterance("b"))
    summary = index_tars(str(tmp_path), None, UtteranceLayout(), 40.0, 1)
    assert summary.num_utterances == 1


def test_a_long_name_in_an_extended_header_is_read(tmp_path):
    name = "x" * 300
    parts = (
        pax_member(pax_record("path", f"{name}.{suffix}"), "short", contents)
        for suffix, contents in (("flac", flac(8000)), ("json", b'{"text": "one"}'))
    )
    write_tar(tmp_path / "a.tar", *parts)
    assert index_tars(str(tmp_path), None, UtteranceLayout(), 40.0, 1).num_utterances == 1


def test_a_compressed_tar_that_claims_a_gigabyte_takes_little_memory(tmp_path):
    header = tarfile.TarInfo("a.flac")
    header.size = 2**30
    with gzip.open(tmp_path / "a.tar.gz", "wb", compresslevel=1) as file:
        file.write(header.tobuf(tarfile.USTAR_FORMAT) + bytes(30 * MIB))
    with peak_memory() as peaks, pytest.raises(UserError, match="Nothing was packed"):
        pack(open_corpus(str(tmp_path / "a.tar.gz"), CorpusOptions()), tmp_path / "out", PackOptions(skip_bad=True))
    assert peaks[0] < 20 * MIB


def test_damage_is_no_member(tmp_path):
    found = list(read_members(TarReader(io.BytesIO(b"\xff" * 2000), 2000), "a.tar"))
    assert all(isinstance(part, TarDamage) for part in found)
