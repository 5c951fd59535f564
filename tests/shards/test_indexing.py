"""The index of tars made by other tools equals that of a packed set; damage is found, reported and skipped."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from webdataset.writer import TarWriter

from voxtral_dist.data.stored.checks import MAX_CHARS_PER_SECOND, Cause
from voxtral_dist.data.stored.index import read_index
from voxtral_dist.data.stored.layout import Field, UtteranceLayout
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.errors import UserError
from voxtral_dist.shards.corpus.corpus import open_corpus
from voxtral_dist.shards.corpus.options import CorpusOptions
from voxtral_dist.shards.indexing import index_tars
from voxtral_dist.shards.lookup import find_utterance
from voxtral_dist.shards.packing import PackOptions, pack
from voxtral_dist.shards.summary import SetSummary, summarize
from voxtral_dist.shards.verification import BrokenUtterance, verify
from voxtral_dist.text.languages import _warn_once

from corpora import SHARD_BYTES, pack_manifest, tone, write_speech_manifest
from stored import contents_of, decoded_in, utterances_in

RATE = 16_000
BLOCK = 512


def index(
    pattern: Path | str, out: Path | None = None, members: UtteranceLayout | None = None, workers: int = 1
) -> SetSummary:
    return index_tars(str(pattern), out, members or UtteranceLayout(), MAX_CHARS_PER_SECOND, workers)


def verified(folder: Path, workers: int = 1) -> list[BrokenUtterance]:
    return [broken for run in verify(str(folder), workers) for broken in run.broken]


@pytest.fixture
def tars(shard_folder, tmp_path) -> Path:
    """Our tars without their index."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for path in shard_folder.glob("*.tar"):
        shutil.copy(path, folder)
    return folder


def wav(seconds: float = 0.5, seed: int = 0) -> bytes:
    contents = io.BytesIO()
    soundfile.write(contents, tone(seconds, seed=seed), RATE, format="WAV")
    return contents.getvalue()


def write_tar(path: Path, utterances: list[dict], mtime: float = 0) -> Path:
    with path.open("wb") as file, TarWriter(file, mtime=mtime) as tar:
        for number, members in enumerate(utterances):
            tar.write({"__key__": f"s{number}"} | members)
    return path


@pytest.mark.parametrize("workers", [1, 2])
def test_the_index_of_our_own_tars_is_that_of_the_packer(tars, shard_folder, workers):
    index(tars, workers=workers)
    ours, theirs = read_index([str(shard_folder)]), read_index([str(tars)])
    assert theirs.languages == ours.languages
    for name in ours.records.dtype.names:
        np.testing.assert_array_equal(theirs.records[name], ours.records[name], name)
    assert [shard.sha256 for shard in theirs.shards] == [shard.sha256 for shard in ours.shards]
    assert contents_of(tars) == contents_of(shard_folder)


def test_a_language_that_shares_its_code_is_said_once_for_all_tars(tmp_path, caplog):
    _warn_once.cache_clear()
    for name, label in {"a": {"lang": "yue"}, "b": {"language": "Cantonese"}, "c": {"lang": "zh"}}.items():
        write_tar(tmp_path / f"{name}.tar", [{"wav": wav(), "json": {"text": "hello", **label}}])
    index(tmp_path)
    assert list(read_index([str(tmp_path)]).languages) == ["zh"]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("Cantonese is labelled `zh`")
    caplog.clear()
    _warn_once.cache_clear()
    assert not verified(tmp_path)
    assert not caplog.records


def test_an_index_may_lie_in_another_folder(tars, shard_folder, tmp_path):
    index(tars, tmp_path / "index")
    assert {path.suffix for path in tars.iterdir()} == {".tar"}
    assert decoded_in(tmp_path / "index") == decoded_in(shard_folder)
    assert verified(tmp_path / "index") == []


@pytest.mark.parametrize(
    ("stored", "members", "expected"),
    [
        ({"wav": wav(), "txt": b"hello \n"}, UtteranceLayout(text=Field("txt"), language="en"), ("hello", "en")),
        ({"wav": wav(), "cls": b"7"}, UtteranceLayout(text=Field("cls"), language=None), ("7", None)),
        (
            {"a.wav": wav(), "b.wav": wav(0.7), "json": b'{"said": "hi", "locale": "German"}'},
            UtteranceLayout("b.wav", Field("json", "said"), Field("json", "locale")),
            ("hi", "de"),
        ),
        ({"wav": wav(), "json": b'{"text": "hi"}', "png": b"no"}, UtteranceLayout(), ("hi", None)),
    ],
)
def test_tars_of_other_layouts(tmp_path, stored, members, expected):
    # A time with a fraction, as writers take it from the clock, makes an extended header for every member.
    write_tar(tmp_path / "t.tar", [stored, stored], mtime=1234.5678)
    summary = index(tmp_path, members=members)
    assert [(one.text, one.language) for one in decoded_in(tmp_path)] == [expected] * 2
    assert [(one.text, one.language) for one in utterances_in(tmp_path)] == [expected] * 2
    assert summary.duration_seconds == (1.4 if "b.wav" in stored else 1.0)
    assert verified(tmp_path) == []


def test_members_that_are_no_utterances_are_skipped(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("deep", "deep/__meta__", "README", "deep/._one.wav"):
            entry = tarfile.TarInfo(name)
            entry.type = tarfile.DIRTYPE if name == "deep" else tarfile.REGTYPE
            tar.addfile(entry)
        for name, contents in ((f"deep/{'one' * 60}.wav", wav()), (f"deep/{'one' * 60}.json", b'{"text": "x"}')):
            entry = tarfile.TarInfo(name)
            entry.size = len(contents)
            tar.addfile(entry, io.BytesIO(contents))
    assert index(tmp_path).num_utterances == 1
    assert utterances_in(tmp_path)[0].key == f"deep/{'one' * 60}"
    assert verified(tmp_path) == []


def test_what_cannot_be_used_is_skipped_and_listed(tmp_path):
    good = {"wav": wav(), "json": b'{"text": "good"}'}
    utterances = [good, good | {"wav": b"no audio"}, {"json": good["json"]}, good | {"json": b"{"}, good]
    path = write_tar(tmp_path / "t.tar", utterances)
    summary = index(tmp_path)
    assert [utterance.key for utterance in utterances_in(tmp_path)] == ["s0", "s4"]
    assert summary.skipped.causes == {Cause.UNDECODABLE: 1, Cause.NO_AUDIO: 1, Cause.NOT_JSON: 1}
    rows = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == ["s1", "s2", "s3"]
    assert all(row["place"].startswith(f"{path}:") for row in rows)
    write_tar(path, [good])
    index(tmp_path)
    assert not (tmp_path / "skipped.jsonl").exists(), "of an index that is no more"


# Damage to a tar of 6 utterances with two members each; the keys that remain, and the message.


def spans(folder: Path) -> list[tuple[int, int]]:
    found = read_index([str(folder)])
    spans = [found.span(number) for number in range(len(found))]
    return [(span.offset, span.num_bytes) for span in spans]


def garble_first_header(contents: bytearray, offset: int) -> None:
    contents[offset + 10 : offset + 30] = b"?" * 20


def garble_second_header(contents: bytearray, offset: int) -> None:
    first = tarfile.TarInfo.frombuf(contents[offset : offset + BLOCK], "utf-8", "strict")
    garble_first_header(contents, offset + BLOCK + -(-first.size // BLOCK) * BLOCK)


def cut_off(contents: bytearray, offset: int) -> None:
    del contents[offset + BLOCK + 100 :]


def cut_between(contents: bytearray, offset: int) -> None:
    del contents[offset:]


def zeros(contents: bytearray, offset: int) -> None:
    contents[offset : offset + 4 * BLOCK] = bytes(4 * BLOCK)


@pytest.mark.parametrize(
    ("damage", "kept", "causes", "said"),
    [
        (garble_first_header, "s0 s1 s3 s4 s5", {Cause.DAMAGED_TAR: 1, Cause.NO_AUDIO: 1}, "header is garbled"),
        (garble_second_header, "s0 s1 s3 s4 s5", {Cause.DAMAGED_TAR: 1, Cause.EMPTY_TEXT: 1}, "header is garbled"),
        (cut_off, "s0 s1", {Cause.DAMAGED_TAR: 1}, "but only 100 follow; 612 bytes lost"),
        (cut_between, "s0 s1", {Cause.DAMAGED_TAR: 1}, "has no end mark"),
        (zeros, "s0 s1 s3 s4 s5", {Cause.DAMAGED_TAR: 1, Cause.NO_AUDIO: 1}, "continues after its end mark"),
    ],
)
def test_a_damaged_tar_is_named_and_read_around_the_damage(tmp_path, damage, kept, causes, said):
    members = {"flac": wav(), "json": b'{"text": "x"}'}
    path = write_tar(tmp_path / "t.tar", [members] * 6)
    index(tmp_path)
    offset = spans(tmp_path)[2][0]
    contents = bytearray(path.read_bytes())
    damage(contents, offset)
    path.write_bytes(contents)
    summary = index(tmp_path)
    assert [one.key for one in utterances_in(tmp_path)] == kept.split()
    assert summary.skipped.causes == causes
    assert all(reason.startswith(str(path)) for reason in summary.skipped.first_reasons)
    assert said in "\n".join(summary.skipped.first_reasons)
    # As a source, the same is kept and skipped.
    packed = pack(open_corpus(str(path), CorpusOptions()), tmp_path / "out", PackOptions(skip_bad=True))
    assert packed.skipped.causes == causes
    assert [one.key for one in utterances_in(tmp_path / "out")] == kept.split()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: None, "There are no tars in"),
        (lambda folder: (folder / "t.tar").write_bytes(b"no tar at all" * 100), "header is garbled"),
        (lambda folder: (folder / "t.tar").touch(), "No utterance in"),
        (lambda folder: write_tar(folder / "t.tar", [{"wav": wav(), "txt": b"x"}]), "--text-member"),
        (lambda folder: (folder / "t.tar.gz").touch(), "is compressed"),
        (lambda folder: (folder / "t.tar").symlink_to(folder / "nowhere"), "There are no tars in"),
    ],
)
def test_tars_that_cannot_be_indexed_are_one_sentence(tmp_path, make, sentence):
    make(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(UserError) as refused:
        index(tmp_path)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} - {"skipped.jsonl"} == before


# `inspect`


def test_the_summary_of_a_set_is_that_of_its_utterances(shard_index):
    summary = summarize(shard_index)
    seconds = shard_index.duration_seconds
    languages = [shard_index.language(number) or "unknown" for number in range(len(shard_index))]
    assert {name: of.num_utterances for name, of in summary.languages.items()} == {
        name: languages.count(name) for name in set(languages)
    }
    for name, of in summary.languages.items():
        assert of.duration_seconds == pytest.approx(sum(seconds[[other == name for other in languages]]))
    assert summary.duration_counts.sum() == summary.rate_counts.sum() == len(shard_index)
    assert summary.longest == (int(seconds.argmax()), seconds.max())
    assert summary.shortest == (int(seconds.argmin()), seconds.min())
    assert summary.num_text_tokens == shard_index.records["num_text_tokens"].sum()


# `verify`


def test_a_whole_set_is_verified(shard_folder):
    assert verified(shard_folder) == verified(shard_folder, workers=2) == []


def other_text(contents: bytearray, offset: int) -> None:
    place = contents.index(b'"text": "', offset) + 9
    contents[place : place + 1] = b"Z"


def shorter_text(contents: bytearray, offset: int) -> None:
    place = contents.index(b'"text": "', offset) + 9
    contents[place : place + 6] = b"\\u005a"


def other_language(contents: bytearray, offset: int) -> None:
    place = contents.index(b'"lang": ', offset) + 9
    contents[place : place + 2] = b"nl"


def no_json(contents: bytearray, offset: int) -> None:
    place = contents.index(b'{"text"', offset)
    contents[place : place + 1] = b"!"


def no_audio(contents: bytearray, offset: int) -> None:
    contents[offset + BLOCK : offset + BLOCK + 2_000] = b"!" * 2_000


def silence(contents: bytearray, offset: int) -> None:
    size = tarfile.TarInfo.frombuf(contents[offset + 2 * BLOCK : offset + 3 * BLOCK], "utf-8", "strict").size
    contents[offset + 3 * BLOCK + 44 : offset + 3 * BLOCK + size] = bytes(size - 44)


def one_sample_off(contents: bytearray, offset: int) -> None:
    contents[offset + 3 * BLOCK + 1_000] ^= 1


@pytest.mark.parametrize(
    ("spoil", "cause", "reason"),
    [
        (garble_first_header, Cause.DAMAGED_TAR, "header is garbled"),
        (other_text, Cause.WRONG_INDEX, "its index says"),
        (shorter_text, Cause.WRONG_INDEX, "num_chars"),
        (other_language, Cause.WRONG_INDEX, "has the language nl, but its index says"),
        (no_json, Cause.NOT_JSON, "cannot be read"),
        (no_audio, Cause.UNDECODABLE, "does not decode"),
        (silence, Cause.SILENT, "is silent"),
        (one_sample_off, Cause.WRONG_INDEX, "CRC-32 differs"),
    ],
)
def test_a_broken_utterance_is_found_and_named(tmp_path, spoil, cause, reason):
    wav_first = [{"json": b'{"text": "hello world", "lang": "en"}', "wav": wav(seed=number)} for number in range(5)]
    flac_first = [{"flac": wav(seed=number), "json": b'{"text": "hello world", "lang": "en"}'} for number in range(5)]
    path = write_tar(tmp_path / "t.tar", wav_first if spoil in (silence, one_sample_off) else flac_first)
    index(tmp_path)
    contents = bytearray(path.read_bytes())
    spoil(contents, spans(tmp_path)[3][0])
    path.write_bytes(contents)
    (broken,) = verified(tmp_path)
    assert (broken.shard, broken.cause) == ("t.tar", cause)
    assert broken.key == ("#3" if spoil is garble_first_header else "s3")
    assert reason in broken.reason


# `show`


def test_every_key_finds_its_utterance(shard_folder):
    found = read_index([str(shard_folder)])
    for number, utterance in enumerate(utterances_in(shard_folder)):
        assert find_utterance(found, utterance.key, Storage()) == number
        assert find_utterance(found, f"#{number}", Storage()) == number


def test_a_key_with_a_long_name_is_found(tmp_path):
    manifest = write_speech_manifest(tmp_path, 3, max_seconds=0.5)
    long = f"{'ü' * 90}"
    shutil.copy(tmp_path / "audio" / "0_001.wav", tmp_path / f"{long}.wav")
    manifest.write_text(manifest.read_text().replace("audio/0_001.wav", f"{long}.wav"))
    pack_manifest(manifest, tmp_path / "out", SHARD_BYTES, skip_bad=False)
    assert find_utterance(read_index([str(tmp_path / "out")]), long, Storage()) == 1


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("audio_0_0000", "did you mean"),
        ("zzz", "the first is"),
        ("#26", "from #0 to #25, but is #26"),
        ("#x", "but is #x"),
    ],
)
def test_a_key_that_there_is_not_is_one_sentence(shard_folder, key, sentence):
    with pytest.raises(UserError, match=sentence):
        find_utterance(read_index([str(shard_folder)]), key, Storage())
