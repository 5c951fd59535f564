"""Manifests and tables as people and scripts write them."""

import csv
import gzip
import json
import unicodedata
from pathlib import Path

import pytest
from written import all_heard, clip, encoded, heard, lines_of, refusals, write, write_clip, write_rows

from voxtral_dist.data.stored.checks import Cause, UnusableError
from voxtral_dist.errors import UserError
from voxtral_dist.shards.corpus.utterances import Refusal, Utterance

ROW = {"audio": "a.wav", "text": "text 3"}
HEARD = [("text 3", 3, 0.5)]


def texts_of(source: Path, **options: object) -> list[str]:
    return [line.text if isinstance(line, Utterance) else line.cause for line in lines_of(source, **options)]


@pytest.mark.parametrize(
    "name",
    [
        "~/a.wav",
        "file://{home}/a.wav",
        "file://localhost{home}/a.wav",
        "{home}/a.wav",
        "a.wav",
        "A.WAV",
        "a",
        ".\\a.wav",
    ],
)
def test_a_name_finds_its_file(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_clip(tmp_path / "a.wav", 3)
    assert all_heard(write_rows(tmp_path / "m.jsonl", [ROW | {"audio": name.format(home=tmp_path)}])) == HEARD


def test_a_name_in_another_unicode_form_finds_its_file(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "é/ü.wav") for form in ("NFC", "NFD"))
    write_clip(tmp_path / decomposed, 3)
    assert all_heard(write_rows(tmp_path / "m.jsonl", [ROW | {"audio": composed}])) == HEARD


def test_a_name_that_may_mean_two_files_finds_none(tmp_path):
    write_clip(tmp_path / "a.wav", 1)
    write_clip(tmp_path / "a.flac", 2)
    (line,) = lines_of(write_rows(tmp_path / "m.jsonl", [ROW | {"audio": "a"}]))
    assert isinstance(line, Utterance)
    with pytest.raises(UnusableError, match=r"may be one of several files in .*: a\.flac, a\.wav"):
        line.audio.found()


def test_paths_with_a_folder_may_be_those_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "download" / "a.wav", 3)
    write_clip(tmp_path / "a.wav", 1)
    (tmp_path / "data").mkdir()
    assert all_heard(write_rows(tmp_path / "data" / "m.jsonl", [ROW | {"audio": "download/a.wav"}])) == HEARD
    # A bare name that is missing must not find another file.
    (line,) = lines_of(write_rows(tmp_path / "data" / "m.jsonl", [ROW]))
    assert isinstance(line, Utterance)
    with pytest.raises(UnusableError, match=r"No such file or directory \(looked for .*data/a\.wav\)"):
        line.audio.found()


def test_rows_with_start_and_end_are_parts(tmp_path):
    write(tmp_path / "a.wav", encoded(clip(0, 1.0)))
    write_clip(tmp_path / "cut.wav", 3)
    rows = [
        ROW | {"start": 0.25, "end": 0.75},
        ROW | {"start_ms": 250, "end_ms": 750},
        ROW | {"start": "0.25", "duration": "0.5"},
        # Cut before: the times are those of the source.
        ROW | {"audio": "cut.wav", "begin_time": 71.0, "end_time": 71.5},
    ]
    found = lines_of(write_rows(tmp_path / "m.jsonl", rows))
    assert [heard(line)[1:] for line in found if isinstance(line, Utterance)] == [(0, 0.5)] * 3 + [(3, 0.5)]
    last = found[-1]
    assert isinstance(last, Utterance)
    assert last.audio.found().read() == (tmp_path / "cut.wav").read_bytes()


@pytest.mark.parametrize(
    ("times", "reason"),
    [
        ({"start": 2, "end": 1}, "ends at end 1, not after its start 2"),
        ({"start": 2}, "has start 2, but neither end nor duration"),
        ({"start": "soon", "end": 1}, "has the start 'soon', which is not a number of seconds"),
    ],
)
def test_times_that_name_no_part_are_refused(tmp_path, times, reason):
    ((cause, message),) = refusals(write_rows(tmp_path / "m.jsonl", [ROW | times]))
    assert cause == Cause.MALFORMED
    assert reason in message


def test_a_part_behind_the_end_is_refused(tmp_path):
    write_clip(tmp_path / "a.wav", 0)
    (line,) = lines_of(write_rows(tmp_path / "m.jsonl", [ROW | {"start": 30, "end": 60}]))
    assert isinstance(line, Utterance)
    with pytest.raises(UnusableError, match=r"it begins at 30\.00 s"):
        line.audio.found().read()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"text": 7.5}, "has the text 7.5, which is not a string"),
        ({"text": True}, "has the text True, which is not a string"),
        ({"audio": {"array": [0.0], "sampling_rate": 1}}, "its object audio has no path, only array, sampling_rate"),
        ({"audio": ["a.wav"]}, "['a.wav'] is neither a path nor an object with a path"),
    ],
)
def test_a_value_of_another_type_is_named(tmp_path, change, reason):
    ((_, message),) = refusals(write_rows(tmp_path / "m.jsonl", [ROW | change]))
    assert reason in message


def test_a_whole_number_is_a_text_and_lines_of_a_text_are_joined(tmp_path):
    rows = [ROW | {"text": 7}, ROW | {"text": "one\r\ntwo\n\n  three \n"}]
    assert texts_of(write_rows(tmp_path / "m.jsonl", rows)) == ["7", "one two three"]


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_an_array_that_ends_early_keeps_its_elements(tmp_path, suffix):
    whole = json.dumps([ROW | {"text": f'{number}, "]\\'} for number in range(3)], indent=2)
    contents = whole[: whole.rindex("{") + 5].encode()
    path = write(tmp_path / f"m{suffix}", gzip.compress(contents) if suffix.endswith("gz") else contents)
    *good, last = lines_of(path)
    assert [line.text for line in good if isinstance(line, Utterance)] == ['0, "]\\', '1, "]\\']
    assert isinstance(last, Refusal)
    assert "the array is not closed" in last.message


def test_an_array_in_one_long_line_is_read(tmp_path):
    rows = [ROW | {"text": f"text {number}", "note": "é" * 5000} for number in range(500)]
    path = write(tmp_path / "m.json", json.dumps(rows, ensure_ascii=False))
    assert path.stat().st_size > 2**22
    assert texts_of(path) == [f"text {number}" for number in range(500)]


def test_quotes_of_a_script_are_no_part_of_a_text_and_those_of_common_voice_are(tmp_path):
    texts = ['He said "hi" to me', '"quoted"', "plain"]
    with (tmp_path / "pandas.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(
            [["path", "sentence"], *([f"{n}.wav", t] for n, t in enumerate(texts))]
        )
    assert texts_of(tmp_path / "pandas.tsv") == texts
    unmatched = ['"open', 'he "said" so', '"quoted"', '"a" and "b"']
    rows = "".join(f"{n}.wav\t{text}\n" for n, text in enumerate(unmatched))
    assert texts_of(write(tmp_path / "cv.tsv", f"path\tsentence\n{rows}")) == unmatched
    everything = '"path"\t"sentence"\n"a.wav"\t"say ""a\tb"""\n'
    assert texts_of(write(tmp_path / "all.tsv", everything)) == ['say "a\tb"']


def test_a_quote_without_an_end_swallows_no_rows(tmp_path):
    rows = 'a.wav,"one\nb.wav,two\nc.wav,"three"\nd.wav,four\ne.wav,"five\nf.wav,six",\ng.wav,"seven\nh.wav,eight\n'
    lines = lines_of(write(tmp_path / "t.csv", f"path,text\n{rows}"))
    assert [line.text for line in lines if isinstance(line, Utterance)] == ["four"]
    assert [line.message.partition(" (")[0] for line in lines if isinstance(line, Refusal)] == [
        "lines 2 to 4 cannot be read as a row",
        "the row has a cell that holds further rows: a quote in it has no end",
        "lines 8 to 9 cannot be read as a row",
    ]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_the_separator_is_found(tmp_path, separator, suffix):
    rows = [("path", "sentence", "locale"), ("a.wav", "text 3", "de")]
    table = write(tmp_path / f"t{suffix}", "".join(separator.join(row) + "\n" for row in rows))
    (line,) = lines_of(table)
    assert isinstance(line, Utterance)
    assert (line.text, line.language) == ("text 3", "de")


def test_a_table_without_a_header_is_read_by_its_columns(tmp_path):
    table = write(tmp_path / "t.csv", "a.wav,x,text 3\n")
    with pytest.raises(UserError, match=r"no column for the audio.*name all its columns by --columns"):
        lines_of(table)
    assert texts_of(table, columns=("audio", "speaker", "text")) == ["text 3"]
    with pytest.raises(UserError, match="`--columns` names 2 columns"):
        lines_of(table, columns=("audio", "text"))


def test_two_columns_of_one_name_are_refused(tmp_path):
    with pytest.raises(UserError, match="has 2 columns named text"):
        lines_of(write(tmp_path / "t.csv", "path,text,text\na.wav,b,c\n"))


def test_pointers_of_git_lfs_are_named(tmp_path):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 72862\n"
    for name in ("a.wav", "m.jsonl", "t.tar"):
        write(tmp_path / name, pointer)
    for name in ("m.jsonl", "t.tar"):
        with pytest.raises(UserError, match="is a Git LFS pointer"):
            lines_of(tmp_path / name)
    for times in ({}, {"offset": 0.1}, {"start": 1, "end": 2}):
        (line,) = lines_of(write_rows(tmp_path / "good.jsonl", [ROW | times]))
        assert isinstance(line, Utterance)
        with pytest.raises(UnusableError, match="run `git lfs pull`"):
            heard(line)


# Folders


def test_hidden_files_of_a_mac_are_no_utterances(tmp_path):
    write_clip(tmp_path / "a.wav", 3)
    write(tmp_path / "a.txt", "text 3")
    for name in ("._a.wav", "._a.txt", "__MACOSX/._a.wav", ".Trash/b.wav", "__MACOSX/b.wav"):
        write(tmp_path / name, b"\0\5\x16\7" + bytes(100))
    assert all_heard(tmp_path) == HEARD


@pytest.mark.parametrize(
    ("text", "contents"),
    [
        ("SA1.TXT", "text 3"),
        ("sa1.txt", "text\n3\n"),
        ("SA1.lab", "text 3"),
        ("SA1.original.txt", "\ufefftext 3"),
    ],
)
def test_the_text_beside_a_file_is_found(tmp_path, text, contents):
    write_clip(tmp_path / "SA1.WAV", 3)
    write(tmp_path / text, contents)
    assert all_heard(tmp_path) == HEARD


def test_times_of_timit_are_no_part_of_its_texts(tmp_path):
    write_clip(tmp_path / "SA1.WAV", 3)
    write(tmp_path / "SA1.TXT", "0 46797 text 3\n")
    write(tmp_path / "SA1.PHN", "0 3050 h#\n")
    assert all_heard(tmp_path) == HEARD


def test_texts_without_audio_are_named(tmp_path):
    write_clip(tmp_path / "a.wav", 3)
    for name in ("a.txt", "b.txt", "README.txt", "a.normalized.txt", "about/notes.txt"):
        write(tmp_path / name, "text 3")
    assert refusals(tmp_path) == [(Cause.NO_AUDIO, "there is no audio beside this text")]


def test_a_folder_with_tables_names_them(tmp_path):
    write_clip(tmp_path / "clips" / "a.wav", 3)
    write(tmp_path / "train.tsv", "path\tsentence\na.wav\ttext 3\n")
    with pytest.raises(UserError, match=r"If train\.tsv names audio and texts, pack that file instead"):
        lines_of(tmp_path)
    (tmp_path / "train.tsv").unlink()
    assert refusals(tmp_path) == [(Cause.EMPTY_TEXT, "there is no text beside it: a.txt is missing")]
