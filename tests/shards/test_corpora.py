"""Every format of a corpus gives the same utterances; unusable ones are refused by place and cause."""

import csv
import gzip
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import datasets
import numpy as np
import pytest
import soundfile

from voxtral_dist.cli.main import build_parser
from voxtral_dist.data.stored.checks import Cause
from voxtral_dist.data.stored.layout import Field, UtteranceLayout
from voxtral_dist.errors import UserError
from voxtral_dist.shards.corpus.corpus import open_corpus
from voxtral_dist.shards.corpus.fields import FieldNames
from voxtral_dist.shards.corpus.formats import CorpusFormat
from voxtral_dist.shards.corpus.options import CorpusOptions
from voxtral_dist.shards.corpus.utterances import Refusal, Utterance
from voxtral_dist.shards.packing import PackOptions, pack
from voxtral_dist.text.languages import _warn_once

from corpora import tone, write_lines
from stored import DecodedUtterance, decoded_in, utterances_in

RATE = 16_000
TEXTS = [f'Ela disse "olá" às {number}, João' for number in range(12)]
CLIPS = [tone(0.4 + 0.05 * number, seed=number) for number in range(12)]
EXPECTED = [DecodedUtterance(f"clip{n:02d}", TEXTS[n], "pt", CLIPS[n].tobytes()) for n in range(12)]
PORTUGUESE = CorpusOptions(language="pt")


def write_clips(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, clip in enumerate(CLIPS):
        soundfile.write(folder / f"clip{number:02d}.{'flac' if number % 2 else 'wav'}", clip, RATE)


def names() -> list[str]:
    return [f"clip{number:02d}.{'flac' if number % 2 else 'wav'}" for number in range(12)]


def nemo(folder: Path) -> tuple[str, CorpusOptions]:
    write_clips(folder)
    rows = [
        {"audio_filepath": name, "text": text, "lang": "pt", "duration": len(clip) / RATE}
        for name, text, clip in zip(names(), TEXTS, CLIPS, strict=True)
    ]
    return str(write_lines(folder / "manifest.json", rows)), CorpusOptions()


def nemo_gzip(folder: Path) -> tuple[str, CorpusOptions]:
    plain = Path(nemo(folder)[0])
    (folder / "manifest.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    return str(folder / "manifest.jsonl.gz"), CorpusOptions()


def lhotse(folder: Path) -> tuple[str, CorpusOptions]:
    write_clips(folder)
    rows = []
    for name, text, clip in zip(names(), TEXTS, CLIPS, strict=True):
        seconds = len(clip) / RATE
        recording = {
            "id": f"rec-{name}",
            "sources": [{"type": "file", "channels": [0], "source": name}],
            "sampling_rate": RATE,
            "num_samples": len(clip),
            "duration": seconds,
        }
        said = {"id": "s", "start": 0.0, "duration": seconds, "text": text, "language": "Portuguese"}
        cut = {"id": name.partition(".")[0], "start": 0, "duration": seconds, "channel": 0, "type": "MonoCut"}
        rows.append(cut | {"supervisions": [said], "recording": recording})
    return str(write_lines(folder / "cuts.jsonl", rows)), CorpusOptions()


def common_voice(folder: Path) -> tuple[str, CorpusOptions]:
    write_clips(folder / "clips")
    lines = ["client_id\tpath\tsentence\tup_votes\tlocale"]
    lines += [f"abc\t{name}\t{text}\t2\tpt-BR" for name, text in zip(names(), TEXTS, strict=True)]
    (folder / "validated.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / "validated.tsv"), CorpusOptions()


def table(folder: Path) -> tuple[str, CorpusOptions]:
    write_clips(folder)
    with (folder / "table.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["wav", "words", "speaker"])
        writer.writerows([name, text, "x"] for name, text in zip(names(), TEXTS, strict=True))
    return str(folder / "table.csv"), CorpusOptions(language="pt", names=FieldNames.chosen("wav", "words", None))


def audio_folder(folder: Path) -> tuple[str, CorpusOptions]:
    write_clips(folder)
    for name, text in zip(names(), TEXTS, strict=True):
        (folder / name).with_suffix(".txt").write_text(f"{text}\n", encoding="utf-8")
    return str(folder), PORTUGUESE


def dataset(folder: Path) -> datasets.Dataset:
    write_clips(folder / "audio")
    columns = {
        "audio": [{"bytes": (folder / "audio" / name).read_bytes(), "path": name} for name in names()],
        "sentence": TEXTS,
        "locale": [0] * 12,
    }
    made = datasets.Dataset.from_dict(columns)
    labels = datasets.ClassLabel(names=["pt"])
    return made.cast_column("audio", datasets.Audio(decode=False)).cast_column("locale", labels)


def parquet(folder: Path) -> tuple[str, CorpusOptions]:
    dataset(folder / "source").to_parquet(folder / "set" / "data" / "train-00000.parquet")
    return str(folder / "set"), CorpusOptions()


def saved_dataset(folder: Path) -> tuple[str, CorpusOptions]:
    datasets.DatasetDict({"train": dataset(folder / "source")}).save_to_disk(folder / "set")
    return str(folder / "set"), CorpusOptions(split="train")


def other_tars(folder: Path) -> tuple[str, CorpusOptions]:
    source, options = nemo(folder)
    pack(open_corpus(source, options), folder / "tars", PackOptions(shard_bytes=60_000))
    assert len(list((folder / "tars").glob("*.tar"))) > 1
    return str(folder / "tars" / "*.tar"), CorpusOptions()


def compressed_tars(folder: Path) -> tuple[str, CorpusOptions]:
    other_tars(folder)
    (folder / "packed").mkdir()
    for tar in (folder / "tars").glob("*.tar"):
        (folder / "packed" / f"{tar.name}.gz").write_bytes(gzip.compress(tar.read_bytes()))
    return str(folder / "packed"), CorpusOptions()


def piped_tars(folder: Path) -> tuple[str, CorpusOptions]:
    source, _ = other_tars(folder)
    last = len(list((folder / "tars").glob("*.tar"))) - 1
    return f"pipe:cat '{Path(source).parent}/tars-{{000000..{last:06d}}}.tar'", CorpusOptions()


SOURCES = [
    nemo,
    nemo_gzip,
    lhotse,
    common_voice,
    table,
    audio_folder,
    parquet,
    saved_dataset,
    other_tars,
    compressed_tars,
    piped_tars,
]


def test_a_pipe_whose_command_fails_is_refused(tmp_path):
    source = open_corpus("pipe:cat nowhere.tar", CorpusOptions())
    with pytest.raises(UserError, match=r"The tar pipe:cat nowhere\.tar cannot be read"):
        pack(source, tmp_path / "out", PackOptions())


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_every_format_gives_the_same_utterances(tmp_path, make: Callable[[Path], tuple[str, CorpusOptions]]):
    source, options = make(tmp_path / "source")
    summary = pack(open_corpus(source, options), tmp_path / "out", PackOptions())
    assert decoded_in(tmp_path / "out") == EXPECTED
    assert summary.num_utterances == 12
    assert not list(tmp_path.glob("out/skipped.jsonl"))


def test_segments_of_a_recording_are_cut_to_the_sample(tmp_path):
    soundfile.write(tmp_path / "long.flac", np.concatenate(CLIPS), RATE)
    starts = np.cumsum([0, *(len(clip) for clip in CLIPS)])
    rows = [
        {"audio_filepath": "long.flac", "text": text, "offset": start / RATE, "duration": len(clip) / RATE}
        for text, start, clip in zip(TEXTS, starts[:-1], CLIPS, strict=True)
    ]
    manifest = write_lines(tmp_path / "m.jsonl", rows)
    pack(open_corpus(str(manifest), PORTUGUESE), tmp_path / "out", PackOptions())
    found = decoded_in(tmp_path / "out")
    assert [(one.text, one.pcm) for one in found] == [(one.text, one.pcm) for one in EXPECTED]
    assert len({one.key for one in found}) == 12
    assert found[1].key == "long-000000400"


def test_a_cut_of_one_channel_has_that_channel(tmp_path):
    left, right = tone(2.0, seed=1), tone(2.0, seed=2)
    soundfile.write(tmp_path / "call.wav", np.stack([left, right], axis=1), RATE)
    recording = {"sources": [{"type": "file", "channels": [0, 1], "source": "call.wav"}], "duration": 2.0}
    row = {"id": "a", "start": 0.5, "duration": 1.0, "channel": 1, "recording": recording}
    said = [{"start": 0.6, "text": "world"}, {"start": 0.0, "text": "hello"}]
    manifest = write_lines(tmp_path / "m.jsonl", [row | {"supervisions": said}])
    pack(open_corpus(str(manifest), CorpusOptions()), tmp_path / "out", PackOptions())
    assert decoded_in(tmp_path / "out") == [DecodedUtterance("a", "hello world", None, right[8_000:24_000].tobytes())]


def test_a_recording_of_24_bits_is_cut_without_loss(tmp_path):
    samples = (tone(1.0, seed=3).astype(np.int32) << 16) + (5 << 8)
    soundfile.write(tmp_path / "fine.wav", samples, 44_100, subtype="PCM_24")
    row = {"audio_filepath": "fine.wav", "text": "x", "offset": 0.1, "duration": 0.2}
    pack(open_corpus(str(write_lines(tmp_path / "m.jsonl", [row])), CorpusOptions()), tmp_path / "out", PackOptions())
    (utterance,) = utterances_in(tmp_path / "out")
    (tmp_path / "cut.flac").write_bytes(utterance.audio)
    cut, rate = soundfile.read(tmp_path / "cut.flac", dtype="int32")
    assert rate == 44_100
    np.testing.assert_array_equal(cut, samples[4_410 : 4_410 + 8_820])


def lines_of(source: Path, options: CorpusOptions | None = None) -> list[Utterance | Refusal]:
    return list(open_corpus(str(source), options or CorpusOptions()).lines())


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ("de", "de"),
        ("DE", "de"),
        ("pt-BR", "pt"),
        ("zh_CN", "zh"),
        ("deu", "de"),
        ("German", "de"),
        (None, None),
        ("", None),
    ],
)
def test_languages_are_found_in_codes_locales_and_names(tmp_path, value, code):
    (line,) = lines_of(write_lines(tmp_path / "m.jsonl", [{"audio": "a.wav", "text": "x", "lang": value}]))
    assert isinstance(line, Utterance)
    assert line.language == code


@pytest.mark.parametrize("value", ["klingon", "xx", "und", 7, {"code": "en"}])
def test_a_language_that_there_is_not_is_a_cause_of_its_own(tmp_path, value):
    (line,) = lines_of(write_lines(tmp_path / "m.jsonl", [{"audio": "a.wav", "text": "x", "lang": value}]))
    assert isinstance(line, Refusal)
    assert line.cause == Cause.UNKNOWN_LANGUAGE


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"type": "MixedCut", "recording": None}, Cause.NO_AUDIO),
        ({"recording": {"sources": [{"type": "command", "channels": [0], "source": "sox"}]}}, Cause.NO_AUDIO),
        ({"recording": {"sources": []}}, Cause.NO_AUDIO),
        ({"supervisions": []}, Cause.EMPTY_TEXT),
        ({"supervisions": None}, Cause.EMPTY_TEXT),
        ({"start": "soon"}, Cause.MALFORMED),
        ({"supervisions": 7}, Cause.MALFORMED),
        ({"supervisions": [{"start": "soon", "text": "x"}]}, Cause.MALFORMED),
        ({"recording": {"sources": {"type": "file"}}}, Cause.MALFORMED),
        ({"recording": {"sources": ["clip00.wav"]}}, Cause.MALFORMED),
        ({"channel": [0, 1]}, Cause.NO_AUDIO),
    ],
)
def test_a_cut_that_is_no_part_of_one_recording_is_refused(tmp_path, change, cause):
    good = json.loads(Path(lhotse(tmp_path)[0]).read_text().splitlines()[0])
    (line,) = lines_of(write_lines(tmp_path / "one.jsonl", [good | change]))
    assert isinstance(line, Refusal)
    assert line.cause == cause


def test_rows_of_a_table_that_are_no_rows_are_refused(tmp_path):
    (tmp_path / "t.tsv").write_text('path\tsentence\na.wav\t"open quote\nb.wav\nc.wav\tc\textra\nd.wav\t\n')
    first, short, long, blank = lines_of(tmp_path / "t.tsv")
    assert isinstance(first, Utterance)
    assert first.text == '"open quote'
    assert [line.cause for line in (short, long, blank)] == [Cause.MALFORMED, Cause.MALFORMED, Cause.EMPTY_TEXT]
    assert [line.place.rpartition(":")[2] for line in (short, long, blank)] == ["3", "4", "5"]


def test_files_of_a_folder_without_a_text_are_named(tmp_path):
    audio_folder(tmp_path)
    (tmp_path / "clip00.txt").unlink()
    (tmp_path / "clip01.txt").write_text(" \n")
    (tmp_path / "clip02.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.m4a").write_text("no audio that could be decoded")
    lines = lines_of(tmp_path)
    assert [type(line) for line in lines] == [Refusal] * 3 + [Utterance] * 9 + [Refusal]
    assert {line.cause for line in lines if isinstance(line, Refusal)} == {Cause.EMPTY_TEXT}


def test_a_file_name_that_is_not_unicode_is_packed(tmp_path):
    audio_folder(tmp_path / "source")
    name = b"caf\xe9.wav".decode("utf-8", "surrogateescape")
    (tmp_path / "source" / "clip00.wav").rename(tmp_path / "source" / name)
    (tmp_path / "source" / "clip00.txt").unlink()
    with pytest.raises(UserError, match="there is no text beside it"):
        pack(open_corpus(str(tmp_path / "source"), PORTUGUESE), tmp_path / "out", PackOptions())
    source = open_corpus(str(tmp_path / "source"), PORTUGUESE)
    summary = pack(source, tmp_path / "out", PackOptions(skip_bad=True))
    assert summary.skipped.causes == {Cause.EMPTY_TEXT: 1}
    assert rb"caf\udce9.wav" in "\n".join(summary.lines()).encode("utf-8")
    (tmp_path / "source" / name).with_suffix(".txt").write_text("ao fim")
    pack(open_corpus(str(tmp_path / "source"), PORTUGUESE), tmp_path / "again", PackOptions())
    assert decoded_in(tmp_path / "again")[0].key == "caf?"


def test_a_tar_with_other_members_is_read_by_its_layout(tmp_path):
    write_clips(tmp_path)
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name in names()[:2]:
            (tmp_path / "text").write_text("hello\n")
            tar.add(tmp_path / name, name.replace(".", ".far."))
            tar.add(tmp_path / name, name.replace(".", ".near."))
            tar.add(tmp_path / "text", f"{name.partition('.')[0]}.txt")
    members = UtteranceLayout(audio="near.wav", text=Field("txt"), language="en")
    first, second = lines_of(tmp_path / "t.tar", CorpusOptions(layout=members))
    assert isinstance(first, Utterance)
    assert (first.key, first.text, first.language) == ("clip00", "hello", "en")
    assert isinstance(second, Refusal)
    assert second.cause == Cause.NO_AUDIO


@pytest.mark.parametrize(
    ("member", "contents", "layout"),
    [
        ("json", '{"text": "hello", "lang": "yue"}', UtteranceLayout()),
        ("json", '{"text": "hello", "language": "yue"}', UtteranceLayout()),
        ("lang", "yue", UtteranceLayout(text=Field("txt"), language=Field("lang"))),
    ],
)
def test_a_tar_in_a_language_that_shares_its_code_is_warned_of(tmp_path, caplog, member, contents, layout):
    _warn_once.cache_clear()
    write_clips(tmp_path)
    (tmp_path / "label").write_text(contents)
    (tmp_path / "text").write_text("hello")
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(tmp_path / names()[0], names()[0])
        tar.add(tmp_path / "text", "clip00.txt")
        tar.add(tmp_path / "label", f"clip00.{member}")
    (found,) = lines_of(tmp_path / "t.tar", CorpusOptions(layout=layout))
    assert isinstance(found, Utterance)
    assert found.language == "zh"
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("Cantonese is labelled `zh`")


def test_a_dataset_without_audio_or_split_is_refused(tmp_path):
    source, _ = saved_dataset(tmp_path)
    for options, sentence in [
        (CorpusOptions(split="test"), "must be one of its splits, but is 'test' instead: it has train"),
        (CorpusOptions(names=FieldNames.chosen(None, "words", None)), "has no column with text, only audio, sentence"),
    ]:
        with pytest.raises(UserError, match=sentence):
            open_corpus(source, options)
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "mute")
    with pytest.raises(UserError, match="has no column with audio, only text"):
        open_corpus(str(tmp_path / "mute"), CorpusOptions())


@pytest.mark.parametrize(
    ("name", "contents", "sentence"),
    [
        ("nowhere.jsonl", None, "does not exist"),
        ("t.csv", "path,words\n", "no column for the text"),
        ("t.csv", "", "no column for the audio, only nothing"),
        ("empty", "folder", "holds no audio files"),
        ("empty/*.tar", "folder", "*.tar"),
        ("s3://bucket/manifest.jsonl", "elsewhere", "must be a local file"),
        ("hf:", "elsewhere", "cannot be opened"),
        ("hf:nobody/nothing", "elsewhere", "cannot be opened"),
    ],
)
def test_a_source_that_cannot_be_read_is_one_sentence(tmp_path, name, contents, sentence):
    (tmp_path / "empty").mkdir()
    path = tmp_path / name
    if contents not in (None, "folder", "elsewhere"):
        path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    with pytest.raises(UserError) as refused:
        list(open_corpus(name if contents == "elsewhere" else str(path), CorpusOptions()).lines())
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_command_line_takes_every_format():
    for name in get_args(CorpusFormat):
        parsed = build_parser().parse_args(["shards", "pack", "corpus", "out", "--format", name])
        assert parsed.format == name


def test_a_source_is_identified_by_its_contents(tmp_path):
    source, options = nemo(tmp_path)
    before = open_corpus(source, options).identity
    assert open_corpus(source, options).identity == before
    with Path(source).open("a") as file:
        file.write("\n")
    assert open_corpus(source, options).identity != before
