"""Packing: what goes in comes out, equal input makes equal bytes, and what cannot be used is named by file and line."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset

from voxtral_dist.cli.main import build_parser
from voxtral_dist.data.stored.checks import ALWAYS_POSSIBLE_CHARS, MAX_CHARS_PER_SECOND, Cause
from voxtral_dist.data.stored.index import read_index
from voxtral_dist.errors import UserError
from voxtral_dist.shards.corpus.corpus import open_corpus
from voxtral_dist.shards.corpus.options import CorpusOptions
from voxtral_dist.shards.journal import PackingJournal
from voxtral_dist.shards.packed_utterance import PackRules
from voxtral_dist.shards.packing import PackOptions, PackProgress, pack
from voxtral_dist.shards.skipped import read_skipped
from voxtral_dist.shards.summary import SetSummary

from corpora import SHARD_BYTES, pack_manifest, tone, write_lines, write_speech_manifest
from stored import StoppedError, contents_of, decoded_in, member_groups, stop_at, utterances_in

ALL = 10**9
RATE = 16_000


def rows_of(manifest: Path) -> list[dict]:
    return [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]


def expected_fields(row: dict) -> dict:
    return {name: value for name, value in row.items() if name != "audio_filepath"}


def pack_from(manifest: Path, out: Path, **options) -> SetSummary:
    return pack(open_corpus(str(manifest), CorpusOptions()), out, PackOptions(**options))


@pytest.fixture
def clips(tmp_path) -> Path:
    """A folder with two good clips of half a second, and files that are not audio."""
    for number in (1, 2):
        soundfile.write(tmp_path / f"good{number}.wav", tone(0.5, seed=number), RATE)
    (tmp_path / "notes.wav").write_text("this is no audio")
    (tmp_path / "empty.wav").touch()
    (tmp_path / "folder.wav").mkdir()
    soundfile.write(tmp_path / "nothing.wav", np.zeros(0), RATE)
    soundfile.write(tmp_path / "zeros.wav", np.zeros(RATE), RATE)
    soundfile.write(tmp_path / "hiss.wav", tone(1.0).astype(np.float64) / 32768 * 0.002, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "infinite.wav", np.array([0.5, np.inf, 0.5]), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "fast.wav", tone(0.5), 1_000_000)
    soundfile.write(tmp_path / "slow.flac", tone(2.0), 1)
    soundfile.write(tmp_path / "slower.wav", tone(0.1), 50)
    return tmp_path


def good_row(number: int = 1) -> dict:
    return {"audio_filepath": f"good{number}.wav", "text": f"text {number}", "lang": "en"}


def test_packed_utterances_read_back_as_they_were(speech_manifest, shard_folder, shard_index):
    rows = rows_of(speech_manifest)
    assert len(shard_index) == len(rows)
    for number, (group, row) in enumerate(zip(member_groups(shard_index), rows, strict=True)):
        suffix = Path(row["audio_filepath"]).suffix[1:]
        assert group.members[suffix] == (speech_manifest.parent / row["audio_filepath"]).read_bytes()
        assert json.loads(group.members["json"]) == expected_fields(row)
        assert shard_index.language(number) == row["lang"]


def test_webdataset_reads_the_same_utterances_in_the_same_order(speech_manifest, shard_folder, shard_index):
    tars = sorted(map(str, shard_folder.glob("*.tar")))
    assert len(tars) == len(shard_index.shards) > 1
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    rows = rows_of(speech_manifest)
    assert len({sample["__key__"] for sample in samples}) == len(rows)
    for sample, row in zip(samples, rows, strict=True):
        suffix = Path(row["audio_filepath"]).suffix[1:]
        assert sample[suffix] == (speech_manifest.parent / row["audio_filepath"]).read_bytes()
        assert json.loads(sample["json"]) == expected_fields(row)


def test_a_shard_ends_with_the_utterance_that_fills_it(shard_index):
    *full, last = shard_index.shards
    assert all(shard.num_bytes >= SHARD_BYTES for shard in full)
    # The largest utterance is far smaller than a shard.
    assert all(shard.num_bytes < 1.5 * SHARD_BYTES for shard in [*full, last])


@pytest.mark.parametrize("num_workers", [1, 3])
def test_any_number_of_workers_makes_equal_bytes(speech_manifest, shard_folder, tmp_path, num_workers):
    again = tmp_path / shard_folder.name
    pack_from(speech_manifest, again, shard_bytes=SHARD_BYTES, num_workers=num_workers)
    assert "index.npy" in contents_of(again)
    assert contents_of(again) == contents_of(shard_folder)


def test_flac_is_16_khz_mono_and_loses_nothing_of_such_audio(tmp_path, speech_manifest, shard_folder):
    pack_from(speech_manifest, tmp_path / "flac", rules=PackRules(encode="flac"))
    assert decoded_in(tmp_path / "flac") == decoded_in(shard_folder)
    for utterance in utterances_in(tmp_path / "flac"):
        assert utterance.audio_suffix == "flac"
        (tmp_path / "clip.flac").write_bytes(utterance.audio)
        found = soundfile.info(tmp_path / "clip.flac")
        assert (found.samplerate, found.channels, found.format) == (RATE, 1, "FLAC")


@pytest.mark.parametrize(
    ("rate", "channels", "subtype"),
    [(48_000, 1, "PCM_16"), (16_000, 2, "PCM_16"), (44_100, 2, "PCM_24"), (96_000, 1, "FLOAT")],
)
def test_unusual_audio_is_taken(tmp_path, rate, channels, subtype):
    wave = tone(0.5, rate).astype(np.float64) / 32768
    soundfile.write(tmp_path / "a.wav", np.stack([wave] * channels, axis=1), rate, subtype=subtype)
    manifest = write_lines(tmp_path / "m.jsonl", [{"audio": "a.wav", "text": "x", "duration": 0.5}])
    assert pack_from(manifest, tmp_path / "out").duration_seconds == 0.5
    assert utterances_in(tmp_path / "out")[0].audio == (tmp_path / "a.wav").read_bytes()


def test_the_summary_counts_what_was_packed(clips):
    rows = [good_row(1), good_row(2) | {"lang": None}]
    summary = pack_manifest(write_lines(clips / "m.jsonl", rows), clips / "out", ALL, skip_bad=False)
    assert (summary.num_utterances, summary.duration_seconds, summary.num_shards) == (2, 1.0, 1)
    assert {name: of.num_utterances for name, of in summary.languages.items()} == {"en": 1, "unknown": 1}
    assert summary.skipped.count == 0
    text = list(summary.lines())
    assert text[0].startswith("2 utterances, 0.00 h, 1 shard")
    assert text[-1].split() == ["0.5", "to", "1", "█" * 40, "2"]


@pytest.mark.parametrize(
    "names",
    [
        ("audio_filepath", "text", "lang"),
        ("path", "sentence", "locale"),
        ("audio", "transcript", "language"),
    ],
)
def test_field_names_of_other_corpora_are_understood(clips, names):
    audio, text, language = names
    row = {audio: "good1.wav", text: "hello", language: "de", "speaker": "x"}
    pack_manifest(write_lines(clips / "m.jsonl", [row]), clips / "out", ALL, skip_bad=False)
    index = read_index([str(clips / "out")])
    (group,) = member_groups(index)
    assert json.loads(group.members["json"]) == {"text": "hello", "lang": "de", "speaker": "x"}
    assert index.language(0) == "de"


@pytest.mark.parametrize(
    "audio",
    [
        "deep/er/folder.with.dots/clip.one.wav",
        "Grüße 日本.wav",
        f"{'long' * 40}.wav",
        "UPPER.WAV",
        "clip.unknown",
        ".wav",
    ],
)
def test_any_file_name_can_be_packed(clips, audio):
    target = clips / audio
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(clips / "good1.wav", target)
    rows = [good_row(2), good_row() | {"audio_filepath": audio}, good_row(2)]
    pack_manifest(write_lines(clips / "m.jsonl", rows), clips / "out", ALL, skip_bad=False)
    utterances = utterances_in(clips / "out")
    assert utterances[1].audio == target.read_bytes()
    streamed = list(webdataset.WebDataset([str(clips / "out" / "out-000000.tar")], shardshuffle=False))
    assert [sample["__key__"] for sample in streamed] == [utterance.key for utterance in utterances]


def test_repeated_audio_gets_keys_that_differ(clips):
    shutil.copy(clips / "good1.wav", clips / "good1-2.wav")
    rows = [good_row(), good_row(), good_row() | {"audio_filepath": "good1-2.wav"}, good_row()]
    pack_manifest(write_lines(clips / "m.jsonl", rows), clips / "out", ALL, skip_bad=False)
    assert [utterance.key for utterance in utterances_in(clips / "out")] == ["good1", "good1-2", "good1-2-2", "good1-3"]


# Line 1 and line 3 of the manifest are good; this is line 2, its cause, and what the refusal says about it.
LONG = "x" * (ALWAYS_POSSIBLE_CHARS + 1)
BAD_LINES = {
    "no text": ('{"audio_filepath": "good1.wav"}', Cause.EMPTY_TEXT, "has no text"),
    "blank text": ('{"audio_filepath": "good1.wav", "text": "  "}', Cause.EMPTY_TEXT, "has no text"),
    "fraction as text": ('{"audio_filepath": "good1.wav", "text": 7.5}', Cause.EMPTY_TEXT, "has the text 7.5, which"),
    "no audio": ('{"text": "hello"}', Cause.NO_AUDIO, "names no audio"),
    "no JSON": ('{"audio_filepath": ', Cause.NOT_JSON, "not valid JSON"),
    "no object": ('["good1.wav", "hello"]', Cause.NOT_JSON, "not a JSON object"),
    "missing audio": ('{"path": "nowhere.wav", "text": "x"}', Cause.UNREADABLE, "nowhere.wav cannot be read: No such"),
    "audio is a folder": ('{"path": "folder.wav", "text": "x"}', Cause.UNREADABLE, "folder.wav cannot be read"),
    "text as audio": ('{"path": "notes.wav", "text": "x"}', Cause.UNDECODABLE, "notes.wav does not decode"),
    "no bytes": ('{"path": "empty.wav", "text": "x"}', Cause.UNDECODABLE, "empty.wav does not decode"),
    "no samples": ('{"path": "nothing.wav", "text": "x"}', Cause.EMPTY_AUDIO, "contains no audio"),
    "zeros": ('{"path": "zeros.wav", "text": "x"}', Cause.SILENT, "is silent"),
    "below -60 dB": ('{"path": "hiss.wav", "text": "x"}', Cause.SILENT, "is silent"),
    "infinite": ('{"path": "infinite.wav", "text": "x"}', Cause.NOT_FINITE, "not finite"),
    "1 MHz": ('{"path": "fast.wav", "text": "x"}', Cause.ABSURD_CLAIM, "claims a sampling rate of 1000000 Hz"),
    "50 Hz": ('{"path": "slower.wav", "text": "x"}', Cause.ABSURD_CLAIM, "claims a sampling rate of 50 Hz"),
    "hours": ('{"path": "slow.flac", "text": "x"}', Cause.ABSURD_CLAIM, "claims to be 9 h long"),
    "too much text": (f'{{"path": "good1.wav", "text": "{LONG}"}}', Cause.TEXT_TOO_LONG, "too short for a text of 51"),
    "wrong length": ('{"path": "good1.wav", "text": "x", "duration": 1.2}', Cause.WRONG_LENGTH, "says 1.20 s"),
    "segment behind the end": (
        '{"path": "good1.wav", "text": "x", "offset": 3}',
        Cause.WRONG_LENGTH,
        "begins at 3.00 s",
    ),
    "segment over the end": (
        '{"path": "good1.wav", "text": "x", "offset": 0.1, "duration": 2}',
        Cause.WRONG_LENGTH,
        "decodes to 0.40 s",
    ),
    "segment of text": ('{"path": "notes.wav", "text": "x", "offset": 1}', Cause.UNDECODABLE, "does not decode"),
    "segment of nothing": ('{"path": "nowhere.wav", "text": "x", "offset": 1}', Cause.UNREADABLE, "cannot be read"),
    "no number": ('{"path": "good1.wav", "text": "x", "duration": "long"}', Cause.MALFORMED, "not a number of seconds"),
    "name of no file": (r'{"path": "a\u0000.wav", "text": "x"}', Cause.UNREADABLE, "cannot be read"),
    "segment of no file": (r'{"path": "a\u0000.wav", "text": "x", "offset": 1}', Cause.UNREADABLE, "cannot be read"),
    "half a character": (r'{"path": "\ud800.wav", "text": "x"}', Cause.UNREADABLE, "cannot be read"),
    "text of half a character": (r'{"path": "good1.wav", "text": "\ud800"}', Cause.MALFORMED, "not Unicode"),
    "NaN seconds": ('{"path": "good1.wav", "text": "x", "duration": NaN}', Cause.MALFORMED, "number of seconds"),
    "no language": ('{"path": "good1.wav", "text": "x", "lang": "klingon"}', Cause.UNKNOWN_LANGUAGE, "'klingon'"),
}


@pytest.fixture(params=BAD_LINES.values(), ids=BAD_LINES.keys())
def bad_manifest(request, clips) -> tuple[Path, Cause, str]:
    line, cause, sentence = request.param
    manifest = clips / "m.jsonl"
    manifest.write_text("\n".join([json.dumps(good_row(1)), line, json.dumps(good_row(2)), ""]))
    return manifest, cause, sentence


def test_a_bad_line_is_refused_by_file_and_line(bad_manifest, tmp_path):
    manifest, _, sentence = bad_manifest
    with pytest.raises(UserError) as refused:
        pack_manifest(manifest, tmp_path / "out", ALL, skip_bad=False)
    assert str(refused.value).startswith(f"{manifest}:2: ")
    assert sentence in str(refused.value)
    assert "--skip-bad" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert list((tmp_path / "out").iterdir()) == [], "a refused set leaves nothing that looks like one"


def test_with_skip_bad_a_bad_line_is_skipped_and_listed(bad_manifest, tmp_path):
    manifest, cause, sentence = bad_manifest
    summary = pack_manifest(manifest, tmp_path / "out", ALL, skip_bad=True)
    assert summary.num_utterances == 2
    assert summary.skipped.causes == {cause: 1}
    assert summary.skipped.first_reasons[0].startswith(f"{manifest}:2: ")
    assert sentence in summary.skipped.first_reasons[0]
    assert f"skipped 1: 1 {cause}" in summary.lines()
    (row,) = rows_of(tmp_path / "out" / "skipped.jsonl")
    assert (row["place"], row["cause"]) == (f"{manifest}:2", cause)
    assert sentence in row["reason"]
    assert [utterance.key for utterance in utterances_in(tmp_path / "out")] == ["good1", "good2"]


def test_a_text_may_have_as_many_characters_as_the_rule_says(clips):
    rows = [{"path": "good1.wav", "text": "x" * ALWAYS_POSSIBLE_CHARS}, {"path": "good2.wav", "text": LONG}]
    manifest = write_lines(clips / "m.jsonl", rows)
    summary = pack_from(manifest, clips / "one", skip_bad=True)
    assert (summary.num_utterances, summary.skipped.causes) == (1, {Cause.TEXT_TOO_LONG: 1})
    assert pack_from(manifest, clips / "two", rules=PackRules(max_chars_per_second=200)).num_utterances == 2


def test_the_commands_have_the_rule_of_the_library():
    for arguments in (["pack", "corpus", "out"], ["index", "tars"]):
        parsed = build_parser().parse_args(["shards", *arguments])
        assert parsed.max_chars_per_second == PackRules().max_chars_per_second == MAX_CHARS_PER_SECOND


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Files of this process cannot grow beyond 100,000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_full_disk_is_not_taken_for_bad_audio(speech_manifest, tmp_path, small_disk, skip_bad):
    with pytest.raises(UserError, match=r"cannot be written: File too large\.") as refused:
        pack_manifest(speech_manifest, tmp_path / "out", ALL, skip_bad)
    assert "the audio" not in str(refused.value)


@pytest.mark.parametrize("contents", ["", "\n \n", '{"audio_filepath": "notes.wav", "text": "hello"}\n'])
def test_a_manifest_of_nothing_usable_makes_no_set(clips, contents):
    (clips / "m.jsonl").write_text(contents)
    with pytest.raises(UserError, match="Nothing was packed") as refused:
        pack_manifest(clips / "m.jsonl", clips / "out", ALL, skip_bad=True)
    assert ("notes.wav does not decode" in str(refused.value)) == ("notes" in contents)
    assert list((clips / "out").iterdir()) == []


def test_a_complete_set_is_never_overwritten(clips):
    manifest = write_lines(clips / "m.jsonl", [good_row()])
    pack_manifest(manifest, clips / "out", ALL, skip_bad=False)
    before = contents_of(clips / "out")
    with pytest.raises(UserError, match="holds a complete shard set already"):
        pack_manifest(manifest, clips / "out", ALL, skip_bad=False)
    assert contents_of(clips / "out") == before


def test_durations_are_those_of_the_audio_at_its_own_rate(speech_manifest, shard_index):
    rows = rows_of(speech_manifest)
    measured = [soundfile.info(str(speech_manifest.parent / row["audio_filepath"])).duration for row in rows]
    np.testing.assert_allclose(shard_index.duration_seconds, measured, atol=0.001)


def test_tar_members_carry_no_extended_headers(shard_folder: Path) -> None:
    for path in shard_folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            assert [member.pax_headers for member in tar] == [{}] * len(tar.getmembers())


# Interruptions.


@pytest.fixture(scope="module")
def mixed_manifest(tmp_path_factory) -> Path:
    """80 lines, every ninth unusable."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = rows_of(write_speech_manifest(folder, 80, max_seconds=1.0, seed=5))
    for row in rows[::9]:
        row["audio_filepath"] = "nowhere.wav"
    return write_lines(folder / "manifest.jsonl", rows)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, mixed_manifest) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "set"
    pack_from(mixed_manifest, folder, shard_bytes=100_000, skip_bad=True)
    return folder


@pytest.mark.parametrize("num_removed", [0, 1, 2])
def test_a_packing_killed_between_its_index_and_its_journal_is_complete(
    mixed_manifest, uninterrupted, tmp_path, monkeypatch, num_removed
):
    def killed(journal, everything=False):
        for name in (".packing.records", ".packing.jsonl")[:num_removed]:
            (tmp_path / "set" / name).unlink()

    monkeypatch.setattr(PackingJournal, "discard", killed)
    pack_from(mixed_manifest, tmp_path / "set", shard_bytes=100_000, skip_bad=True)
    monkeypatch.undo()
    if num_removed == 2:
        with pytest.raises(UserError, match="holds a complete shard set already"):
            pack_from(mixed_manifest, tmp_path / "set", shard_bytes=100_000, skip_bad=True)
        return
    with pytest.raises(UserError, match="holds a complete shard set already"):
        pack_from(mixed_manifest, tmp_path / "set", shard_bytes=200_000, skip_bad=True)
    again = pack_from(mixed_manifest, tmp_path / "set", shard_bytes=100_000, skip_bad=True)
    assert again.num_utterances == len(read_index([str(uninterrupted)]))
    assert contents_of(tmp_path / "set") == contents_of(uninterrupted)


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [b"garbled", *lines[1:]],
        lambda lines: [b"[]", *lines[1:]],
        lambda lines: [lines[0], b"\xff", *lines[2:]],
        lambda lines: [lines[0], b"[" * 50_000, *lines[2:]],
        lambda lines: [lines[0], b"7", *lines[2:]],
        lambda lines: [lines[0], b'{"shard": {"location": 5}}', *lines[2:]],
        lambda lines: [lines[0], lines[1].replace(b'"record_bytes": ', b'"record_bytes": 99'), *lines[2:]],
    ],
    ids=range(7),
)
def test_a_damaged_journal_is_one_sentence(mixed_manifest, tmp_path, damage):
    stop_after(mixed_manifest, tmp_path / "set", 30)
    journal = tmp_path / "set" / ".packing.jsonl"
    lines = journal.read_bytes().splitlines()[:2]
    journal.write_bytes(b"".join(line + b"\n" for line in damage(lines)))
    with pytest.raises(UserError, match=r"The journal of the unfinished set in .* is damaged: remove the folder"):
        pack_from(mixed_manifest, tmp_path / "set", shard_bytes=100_000, skip_bad=True)


def stop_after(manifest: Path, out: Path, num_lines: int) -> None:
    """Pack until this many lines were read, and stop as by an exception."""

    def stop(at: PackProgress) -> None:
        if at.num_lines >= num_lines:
            raise StoppedError

    corpus = open_corpus(str(manifest), CorpusOptions())
    with pytest.raises(StoppedError):
        pack(corpus, out, PackOptions(shard_bytes=100_000, skip_bad=True), stop)


def test_damaged_lines_of_the_list_of_skipped_ones_are_counted(tmp_path):
    rows = [
        b'{"cause": "silent", "place": "a:1", "reason": "is silent"}',
        b"\xff",
        b"[]",
        b"[" * 50_000,
        b'{"cause": 1}',
    ]
    (tmp_path / "skipped.jsonl").write_bytes(b"\n".join(rows))
    assert read_skipped(tmp_path / "skipped.jsonl").causes == {"silent": 1, "damaged line": 4}


@pytest.mark.parametrize("stops", [[5], [1, 40], [30, 31, 79], [80]])
def test_interrupted_and_resumed_is_uninterrupted(tmp_path, mixed_manifest, uninterrupted, stops):
    for stop in stops:
        with pytest.raises(StoppedError):
            pack(
                open_corpus(str(mixed_manifest), CorpusOptions()),
                tmp_path / "set",
                PackOptions(100_000, skip_bad=True),
                stop_at(stop),
            )
        assert not (tmp_path / "set" / "index.npy").exists()
    summary = pack_from(mixed_manifest, tmp_path / "set", shard_bytes=100_000, skip_bad=True)
    assert contents_of(tmp_path / "set") == contents_of(uninterrupted)
    assert (summary.num_utterances, summary.skipped.count) == (71, 9)


def command(manifest: Path, out: Path, workers: int, megabytes: int = 1) -> list[str]:
    program = "import sys; from voxtral_dist.cli.main import console; console(sys.argv[1:])"
    options = ["--workers", str(workers), "--shard-megabytes", str(megabytes), "--skip-bad"]
    return [sys.executable, "-c", program, "shards", "pack", str(manifest), str(out), *options]


def listen_to_interrupts() -> None:
    """Undo that processes in the background of a shell ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_until_shards_are_finished(out: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.tar"))) < 3:
        assert process.poll() is None, "it ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def group_members(group: int) -> list[int]:
    """The live processes of a process group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, its_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(its_group) == group and state != "Z":
                found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def long_manifest(tmp_path_factory) -> Path:
    """Many lines with few files: packing takes long enough to be interrupted."""
    folder = tmp_path_factory.mktemp("long")
    rows = rows_of(write_speech_manifest(folder, 40, min_seconds=1.5, max_seconds=2.0, seed=9))
    return write_lines(folder / "manifest.jsonl", rows * 15)


@pytest.fixture(scope="module")
def long_set(tmp_path_factory, long_manifest) -> Path:
    """The set that one uninterrupted packing writes."""
    folder = tmp_path_factory.mktemp("long-set") / "set"
    pack_from(long_manifest, folder, shard_bytes=10**6, skip_bad=True)
    return folder


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_stopped_command_leaves_no_process_and_resumes_when_it_is_rerun(
    tmp_path, long_manifest, long_set, stop, code
):
    out = tmp_path / "set"
    process = subprocess.Popen(
        command(long_manifest, out, workers=2),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=listen_to_interrupts,
    )
    wait_until_shards_are_finished(out, process)
    if stop == signal.SIGINT:
        # As a terminal does it: to all processes of the group.
        os.killpg(process.pid, stop)
    else:
        process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    deadline = time.monotonic() + 10
    while group_members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert group_members(process.pid) == []
    if stop == signal.SIGINT:
        assert errors.count("\n") == 1, errors
        assert "Rerun the same command to resume" in errors
    assert not (out / "shards.json").exists()
    # It may have been stopped between the last rename and the note of it.
    finished = {path: path.stat().st_mtime_ns for path in sorted(out.glob("*.tar"))[:-1]}
    assert subprocess.run(command(long_manifest, out, workers=1), check=False, capture_output=True).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert contents_of(out) == contents_of(long_set)


def interrupt(manifest: Path, out: Path, **options) -> None:
    def end(at: PackProgress) -> None:
        if at.num_lines == 60:
            raise StoppedError

    with pytest.raises(StoppedError):
        pack(open_corpus(str(manifest), CorpusOptions()), out, PackOptions(**options), end)


def test_an_unfinished_set_of_another_source_or_with_other_options_is_refused(
    tmp_path, mixed_manifest, speech_manifest
):
    out = tmp_path / "set"
    interrupt(mixed_manifest, out, shard_bytes=100_000, skip_bad=True)
    before = contents_of(out)
    for manifest, options, sentence in [
        (speech_manifest, {"shard_bytes": 100_000}, "with `source`"),
        (mixed_manifest, {"shard_bytes": 200_000}, "with `shard_bytes` 100000 instead of 200000"),
        (mixed_manifest, {"shard_bytes": 100_000, "rules": PackRules("flac")}, "with `encode` None instead of 'flac'"),
    ]:
        with pytest.raises(UserError, match=sentence):
            pack_from(manifest, out, **options)
        assert contents_of(out) == before


def test_a_manifest_that_changed_while_packing_stood_is_refused(tmp_path, mixed_manifest):
    manifest = write_speech_manifest(tmp_path, 80, max_seconds=0.6)
    interrupt(manifest, tmp_path / "set", shard_bytes=50_000)
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(UserError, match="from the same place with other contents"):
        pack_from(manifest, tmp_path / "set", shard_bytes=50_000)


def test_a_journal_that_was_cut_off_goes_back_to_the_shard_before(tmp_path, mixed_manifest, uninterrupted):
    out = tmp_path / "set"
    interrupt(mixed_manifest, out, shard_bytes=100_000, skip_bad=True)
    journal = out / ".packing.jsonl"
    assert journal.read_bytes().count(b"\n") > 2
    journal.write_bytes(journal.read_bytes()[:-20])
    pack_from(mixed_manifest, out, shard_bytes=100_000, skip_bad=True)
    assert contents_of(out) == contents_of(uninterrupted)


def test_a_refusal_on_the_way_keeps_what_is_finished(tmp_path, mixed_manifest, uninterrupted):
    """Without --skip-bad the first bad line ends a packing; with it, the same command resumes."""
    rows = rows_of(mixed_manifest)
    good = [row for row in rows if row["audio_filepath"] != "nowhere.wav"]
    manifest = write_lines(mixed_manifest.parent / "late.jsonl", [*good, rows[0]])
    with pytest.raises(UserError, match=f"{manifest}:72: "):
        pack_from(manifest, tmp_path / "set", shard_bytes=100_000)
    assert len(list((tmp_path / "set").glob("*.tar"))) > 2
    assert pack_from(manifest, tmp_path / "set", shard_bytes=100_000, skip_bad=True).num_utterances == 71
    assert decoded_in(tmp_path / "set") == decoded_in(uninterrupted)


def test_two_commands_do_not_pack_into_one_folder(tmp_path, mixed_manifest):
    def intrude(at: PackProgress) -> None:
        if at.num_lines == 5:
            with pytest.raises(UserError, match="Another process is packing into"):
                pack_from(mixed_manifest, tmp_path / "set", skip_bad=True)

    options = PackOptions(skip_bad=True)
    summary = pack(open_corpus(str(mixed_manifest), CorpusOptions()), tmp_path / "set", options, intrude)
    assert summary.num_utterances == 71
