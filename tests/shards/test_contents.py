"""`shards inspect` counts words and rates, names what differs from the others, and finds the same text and audio."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from voxtral_dist.cli.main import build_parser
from voxtral_dist.data.stored.storage import Storage, UnreachableError
from voxtral_dist.errors import ReadError
from voxtral_dist.shards.content_statistics import language_statistics, outliers
from voxtral_dist.shards.contents import SetContents, read_contents
from voxtral_dist.shards.duplicates import duplicates, num_with_other_texts, shared_audio

from commands import run_command
from corpora import pack_manifest, tone, write_lines

NUM_ENGLISH = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 English utterances of one second, of which one is fast, two have the same audio, and two the same text."""
    folder = tmp_path_factory.mktemp("contents")
    rows = []
    for number in range(NUM_ENGLISH):
        clip = tone(1.0, seed=number)
        soundfile.write(folder / f"{number}.wav", clip, 16_000)
        rows.append({"audio": f"{number}.wav", "text": f"Say word{number:02d} now", "lang": "en"})
    rows[5]["text"] = "So fast that nobody could ever follow it"
    # The same samples in another file, with another text.
    soundfile.write(folder / "7.flac", tone(1.0, seed=7), 16_000)
    rows[9] = {"audio": "7.flac", "text": "Another text", "lang": "en"}
    rows[11]["text"] = "say Word12, now!"
    for number, text in enumerate(("今天天氣很好", "今天天氣很好", "你好")):
        soundfile.write(folder / f"zh{number}.wav", tone(1.0, seed=100 + number), 16_000)
        rows.append({"audio": f"zh{number}.wav", "text": text, "lang": "zh"})
    out = folder / "set"
    pack_manifest(write_lines(folder / "m.jsonl", rows), out, 10**9, skip_bad=False)
    return out


@pytest.fixture(scope="module")
def contents(folder: Path) -> SetContents:
    seen: list[int] = []
    found = read_contents(str(folder), 1, seen.append)
    assert seen == [NUM_ENGLISH + 3]
    return found


def test_words_and_rates_are_counted_by_language(contents):
    english, chinese = language_statistics(contents)
    assert (english.language, english.num_utterances, english.num_words) == ("en", 24, 22 * 3 + 8 + 2)
    # say, now, each number but 5, 9 and 11, whose place 12 takes, and the words of the two other texts.
    assert english.num_distinct == 2 + 21 + 8 + 2
    assert english.num_once == 20 + 8 + 2
    assert english.words == (3.0, 3.0, 3.0)
    assert english.words_per_second == pytest.approx((3.0, 3.0, 3.0), rel=0.01)
    assert english.characters_per_second[1] == pytest.approx(len("Say word00 now"), rel=0.01)
    assert (chinese.language, chinese.num_words, chinese.words, chinese.words_per_second) == ("zh", 0, None, None)
    assert chinese.characters[2] == pytest.approx(6.0)
    assert contents.characters["今"] == 2
    assert contents.characters["S"] == 23 - 1


def test_an_utterance_that_is_spoken_too_fast_is_an_outlier(contents):
    (found,) = outliers(contents)
    assert found.utterance_id == 5
    assert (found.rate, found.median) == pytest.approx(
        (len("So fast that nobody could ever follow it"), 14.0), rel=0.01
    )


def test_the_same_text_and_the_same_audio_are_found_whatever_their_form(contents):
    texts = duplicates(contents.text_digests, 10)
    assert texts.largest == ((11, 12), (24, 25))
    assert (texts.num_contents, texts.num_utterances) == (2, 4)
    audio = duplicates(contents.audio_digests, 10)
    assert audio.largest == ((7, 9),), "one is WAV, the other FLAC"
    assert num_with_other_texts(contents) == 1


def test_groups_are_listed_by_size_and_unread_utterances_are_none():
    digests = np.array([5, 0, 7, 5, 7, 7, 0, 0, 0, 9], dtype=np.uint64)
    assert duplicates(digests, 10).largest == ((2, 4, 5), (0, 3))
    assert duplicates(digests, 1).largest == ((2, 4, 5),)
    assert (duplicates(digests, 1).num_contents, duplicates(digests, 1).num_utterances) == (2, 5)
    assert duplicates(np.zeros(0, dtype=np.uint64), 10).largest == ()


def test_audio_of_a_training_set_is_found_in_a_test_set(contents):
    class Other:
        audio_digests = np.array([1, contents.audio_digests[3], 0], dtype=np.uint64)

    (found,) = shared_audio({"train": contents, "test": Other()}, 10)  # type: ignore[dict-item]
    assert (found.first, found.second, found.num_utterances, found.pairs) == ("train", "test", 1, ((3, 1),))


def test_the_command_prints_all_of_it(folder, capsys, tmp_path):
    other = shutil.copytree(folder, tmp_path / "copy")
    result = run_command(capsys, "shards", "inspect", folder, other, "--workers", 1)
    assert (result.code, result.err) == (0, "")
    for line in (
        "much faster or slower than others of their language: 1 utterance\n",
        "same text: 4 utterances share 2",
        "  2 times: say Word12, now!",
        "same audio: 2 utterances share 1, 1 of them with different texts\n",
        "  #7 7 = #9 7-2",
        "most frequent words (en): say 22, now 22, ",
    ):
        assert result.out.count(line) == 2, line
    assert "  #5 5  40.0 characters/s (median 14.0)  So fast that nobody could ever follow it" in result.out
    assert f"27 utterances of {other} with audio of {folder}: #0 = #0, " in result.out
    assert "and 17 more" in result.out


def test_without_contents_only_the_index_is_read(folder, capsys, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    (tar,) = broken.glob("*.tar")
    damaged = bytearray(tar.read_bytes())
    damaged[600:700] = b"?" * 100
    tar.write_bytes(damaged)
    result = run_command(capsys, "shards", "inspect", broken, "--no-contents")
    assert result.code == 0
    assert "same audio" not in result.out
    read = run_command(capsys, "shards", "inspect", broken, "--workers", 1)
    assert read.code == 0
    assert "not counted above: 1 unreadable utterance; `shards verify` lists all\n  #0 has other bytes" in read.out
    assert build_parser().parse_args(["shards", "inspect", "a"]).contents is None


def test_a_storage_that_fails_ends_the_reading_and_makes_no_utterance_unreadable(folder, monkeypatch):
    def fail(_storage, span):
        raise UnreachableError(f"{span.location} cannot be read: no answer")

    monkeypatch.setattr(Storage, "read", fail)
    with pytest.raises(ReadError, match="no answer"):
        read_contents(str(folder), 1)
