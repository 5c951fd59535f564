"""Which utterances are shown, which slices are uncertain, and which audio a browser plays."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from voxtral_dist.data.stored.index import read_index
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.reporting.cards import changed_most, in_turns, with_highest_rates, with_most_errors
from voxtral_dist.reporting.embedded_audio import EmbeddedAudio, MissingAudio, StoredAudio, media_type
from voxtral_dist.reporting.statistics import MAX_SLICES, MIN_UTTERANCES, slice_tables
from voxtral_dist.scoring.grouping import Grouping
from voxtral_dist.scoring.results import score_test_set

from saved_results import BASIC, stored_utterances, utterance

ROWS = [
    utterance(0, "a b c d e f g h", "a b c d x x x x"),  # 4 errors, 50 %
    utterance(1, "a", "x y z"),  # 3 errors, 300 %
    utterance(2, "a b", "a b"),
    utterance(3, "...", "x y z z z"),  # 5 errors of nothing
    utterance(4, "a b c d", "x x x x"),  # 4 errors, 100 %
    utterance(5, "a b", ""),  # 2 errors, 100 %
]


def test_the_worst_come_first_and_none_is_without_an_error():
    assert [number for number, _ in with_most_errors(ROWS, 20, "wer")] == [4, 1, 5, 2, 6]
    assert [number for number, _ in with_most_errors(ROWS, 2, "wer")] == [4, 1]
    assert [number for number, _ in with_highest_rates(ROWS, 20, "wer")] == [2, 5, 6, 1]


def test_changes_are_those_of_the_second_run():
    better = [utterance(one.decoded.utterance_id, one.decoded.reference, one.decoded.reference) for one in ROWS[:3]]
    worse = [utterance(one.decoded.utterance_id, one.decoded.reference, "") for one in ROWS[3:]]
    pairs = list(zip(ROWS, better + worse, strict=True))
    assert [number for number, _ in changed_most(pairs, 20, -1, "wer")] == [4, 1, 2]
    assert changed_most(pairs, 20, 1, "wer") == []
    back = [(after, before) for before, after in pairs]
    assert [number for number, _ in changed_most(back, 20, 1, "wer")] == [4, 1, 2]
    assert [number for number, _ in changed_most(back, 1, 1, "wer")] == [4]


def test_characters_decide_where_words_cannot():
    before, after = (
        [utterance(number, "今天天氣很好", text, language="zh") for number, text in enumerate(texts)]
        for texts in (("今天", "今天"), ("今天天氣", "今"))
    )
    pairs = list(zip(before, after, strict=True))
    assert [number for number, _ in changed_most(pairs, 20, -1, "cer")] == [1]
    assert [number for number, _ in changed_most(pairs, 20, 1, "cer")] == [2]
    assert changed_most(pairs, 20, 1, "wer") == []
    assert [number for number, _ in with_most_errors(after, 20, "cer")] == [2, 1]
    assert [number for number, _ in with_highest_rates(after, 20, "cer")] == [2, 1]
    assert [number for number, _ in with_most_errors(after, 20, "wer")] == [1, 2]


def test_every_list_has_its_turn_and_nothing_comes_twice():
    assert list(in_turns([[1, 2, 3], [], [2, 4]], lambda one: one)) == [1, 2, 4, 3]


def test_slices_are_sorted_and_small_ones_marked():
    many = [utterance(number, "a", "x" if number < 9 else "a", language="en") for number in range(MIN_UTTERANCES)]
    few = [utterance(99, "a", "x", language="de"), utterance(98, "a", "a", language="fr", duration_seconds=70.0)]
    languages, durations = slice_tables(score_test_set([*many, *few], BASIC), "wer")
    assert [(row.label, row.is_uncertain) for row in languages.rows] == [("de", True), ("en", False), ("fr", True)]
    assert [row.dot for row in languages.rows] == [1.0, 0.3, 0.0]
    english = languages.rows[1]
    assert (english.low, english.high) == tuple(round(end, 4) for end in english.rates.wer_interval)
    assert (languages.rows[0].low, languages.rows[0].high) == (None, None)
    assert [row.label for row in durations.rows] == ["<5 s", ">=60 s"], "by length, whatever their rates"


def test_slices_go_by_the_rate_by_which_the_set_is_judged():
    texts = {"a": "one two thre", "b": "one two abcdefgh", "c": "one too thre"}
    rows = [
        utterance(number, "one two three", text, fields={"speaker": name})
        for number in (0, 9)
        for name, text in texts.items()
    ]
    result = score_test_set(rows, BASIC, grouping=Grouping(("speaker",)))
    by_words, by_characters = (slice_tables(result, metric)[-1] for metric in ("wer", "cer"))
    assert [row.label for row in by_words.rows] == ["c", "a", "b"]
    assert [row.label for row in by_characters.rows] == ["b", "c", "a"]
    first = by_characters.rows[0]
    assert (first.interval, first.dot) == (first.rates.cer_interval, 1.0)


def test_of_many_slices_the_largest_are_kept():
    rows = [utterance(number, "a", "a", fields={"speaker": f"s{number:03d}"}) for number in range(MAX_SLICES + 7)]
    rows.append(utterance(999, "a", "x", fields={"speaker": f"s{MAX_SLICES + 6:03d}"}))
    table = slice_tables(score_test_set(rows, BASIC, grouping=Grouping(("speaker",))), "wer")[-1]
    assert (len(table.rows), table.num_skipped) == (MAX_SLICES, 7)
    assert table.rows[0].label == f"s{MAX_SLICES + 6:03d}"


def encoded(form: str, subtype: str | None = None) -> bytes:
    written = io.BytesIO()
    soundfile.write(written, np.zeros(1600, dtype=np.int16), 16_000, format=form, subtype=subtype)
    return written.getvalue()


@pytest.mark.parametrize(
    ("form", "subtype", "kind"),
    [
        ("WAV", None, "audio/wav"),
        ("FLAC", None, "audio/flac"),
        ("OGG", "VORBIS", "audio/ogg"),
        ("OGG", "OPUS", "audio/ogg"),
        ("MP3", None, "audio/mpeg"),
        ("AU", None, None),
        ("AIFF", None, None),
        ("RF64", None, None),
    ],
)
def test_audio_is_known_by_its_bytes(form, subtype, kind):
    assert media_type(encoded(form, subtype)) == kind


def test_mp3_with_tags_is_played_and_empty_audio_is_not():
    assert media_type(b"ID3\x04" + bytes(20)) == "audio/mpeg"
    assert media_type(b"") is None


def test_clips_are_those_of_the_same_key(shard_folder):
    stored = StoredAudio(read_index([str(shard_folder)]), Storage())
    originals = stored_utterances(shard_folder)
    one = utterance(3, "a", "b", key=originals[3].key)
    assert stored.read(one) == EmbeddedAudio(media_type(originals[3].audio), originals[3].audio)
    assert stored.read(replace(one, decoded=replace(one.decoded, key="other"))) == MissingAudio(
        f"utterance 3 of the shards is another one, {originals[3].key!r}"
    )
    assert stored.read(replace(one, decoded=replace(one.decoded, utterance_id=len(originals)))) == MissingAudio(
        f"the shards have no utterance {len(originals)}"
    )


def test_a_damaged_clip_is_told_and_no_error(shard_folder, tmp_path):
    for file in shard_folder.iterdir():
        contents = bytearray(file.read_bytes())
        if file.suffix == ".tar":
            contents[600] ^= 255
        (tmp_path / file.name).write_bytes(contents)
    stored = StoredAudio(read_index([str(tmp_path)]), Storage())
    clip = stored.read(utterance(0, "a", "b", key=stored_utterances(shard_folder)[0].key))
    assert isinstance(clip, MissingAudio)
    assert "the checksum differs" in clip.reason
