"""Fuzz targets: mutated inputs of every reader raise only what its callers expect.

`VOXTRAL_FUZZ_EXAMPLES=10000 pytest tests/fuzz` tries so many inputs of each target, and `VOXTRAL_FUZZ_SEED=1` others.

They are drawn by Python's generator, in 0.02 ms. Hypothesis took 3 ms for each, more than most readers do.
"""

from __future__ import annotations

import io
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from voxtral_dist.config.yaml_text import parse_yaml
from voxtral_dist.data.stored.audio import AudioError, decode_audio, decode_pcm
from voxtral_dist.data.stored.checks import UnusableError, unusable_on_failure
from voxtral_dist.data.stored.index import read_index
from voxtral_dist.data.stored.index_files import INDEX_FILE, SHARD_TABLE_FILE, write_index
from voxtral_dist.data.stored.layout import UtteranceLayout
from voxtral_dist.data.stored.mp3_frames import find_mp3_frames
from voxtral_dist.data.stored.shard_set import RECORD, Shard
from voxtral_dist.data.stored.utterance import parse_utterance
from voxtral_dist.data.stored.wav_sizes import read_wav_sizes
from voxtral_dist.errors import UserError
from voxtral_dist.output.console import one_line, printable
from voxtral_dist.output.masking import masked
from voxtral_dist.scoring.hypotheses import read_hypotheses
from voxtral_dist.shards.corpus.audio_location import AudioLocation
from voxtral_dist.shards.corpus.importer import Importer
from voxtral_dist.shards.corpus.manifests import MANIFEST
from voxtral_dist.shards.corpus.options import CorpusOptions
from voxtral_dist.shards.corpus.tables import CSV
from voxtral_dist.shards.corpus.tar_utterances import tar_utterance
from voxtral_dist.shards.corpus.utterances import Refusal, Utterance
from voxtral_dist.shards.journal import PackingJournal
from voxtral_dist.shards.skipped import read_skipped
from voxtral_dist.shards.tars.members import Member, TarDamage, TarReader, read_members
from voxtral_dist.shards.tars.scan import parse_span
from voxtral_dist.shards.tars.writing import tar_end, utterance_bytes
from voxtral_dist.text.json_text import parse_json
from voxtral_dist.training.metrics_file import split_metrics

from corpora import tone
from hostile import PAX_RECORDS, flac, nested, pax_member

NUM_EXAMPLES = int(os.environ.get("VOXTRAL_FUZZ_EXAMPLES", "25"))
SEED = os.environ.get("VOXTRAL_FUZZ_SEED", "0")
RATE = 16_000


def audio_in(format_name: str, subtype: str | None = None) -> bytes:
    encoded = io.BytesIO()
    soundfile.write(encoded, tone(0.1), RATE, format=format_name, subtype=subtype)
    return encoded.getvalue()


UTTERANCE = utterance_bytes("key", {"flac": flac(800), "json": b'{"text": "one", "lang": "en", "x": [1, {"y": 2.5}]}'})
TAR = UTTERANCE + pax_member(PAX_RECORDS[10]) + utterance_bytes("x" * 150, {"txt": b"a", "wav": audio_in("WAV")})
ROW = {"audio_filepath": "a.wav", "text": "one", "lang": "en", "offset": 0.5, "duration": 1e3, "x": [[], {"a": None}]}
CUT = {
    "id": "c",
    "start": 0.5,
    "duration": 1.0,
    "channel": 0,
    "supervisions": [{"start": 0, "text": "one", "language": "en", "custom": {"a": 1}}],
    "recording": {"duration": 2, "sources": [{"type": "file", "channels": [0, 1], "source": "a.wav"}]},
}
METRICS = b'{"kind": "train", "step": 2, "loss": 1.5}\n{"kind": "evaluation", "step": 2, "name": "a", "wer": 0.5}\n'
HYPOTHESES = json.dumps({"reference": "a", "hypothesis": "b", "fields": {"x": 1}, "duration_seconds": 1.5}).encode()
CONFIG = (
    yaml.safe_dump({"num_steps": 5, "a": {"b": [1, 2.5, "x", None, True]}}).encode()
    + b"c: &x [1]\nd: *x\ne: 2020-01-01\n"
)
SEEDS: dict[str, list[bytes]] = {
    "audio": [
        audio_in("FLAC"),
        audio_in("WAV"),
        audio_in("OGG"),
        audio_in("AIFF"),
        audio_in("WAV", "FLOAT"),
        audio_in("MP3"),
    ],
    "tar": [TAR, UTTERANCE, *(pax_member(records) for records in PAX_RECORDS)],
    "json": [json.dumps(ROW).encode(), json.dumps(CUT).encode(), nested(60).encode()],
    "table": [b'path,text,locale\na.wav,one,en\n"b","two\n2",de\n', b"path\ttext\na.wav\tone\n"],
    "yaml": [CONFIG],
    "metrics": [METRICS],
    "hypotheses": [HYPOTHESES + b"\n" + HYPOTHESES],
    "text": [b"see https://me:secret@host/a?sig=1 \x1b[2J hf_abcdefghijklmnopqrst\n"],
}
SNIPPETS = [b"\x00", b"\xff" * 4, b"-", b"9" * 30, b"1e999", b'"', b"[", b"{", b"\n", b"null", b"\x1b[", b"\\ud800"]
EDITS = ("replace", "insert", "remove", "cut", "repeat")


def edited(contents: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    for kind, place, piece in edits:
        at = int(place * len(contents))
        match kind:
            case "replace":
                contents = contents[:at] + piece + contents[at + len(piece) :]
            case "insert":
                contents = contents[:at] + piece + contents[at:]
            case "remove":
                contents = contents[:at] + contents[at + len(piece) :]
            case "cut":
                contents = contents[:at]
            case "repeat":
                contents = contents[:at] + contents[at : at + 600] * 2 + contents[at + 600 :]
    return contents


def drawn_input(generator: random.Random, kind: str) -> bytes:
    """A seed with one to six edits, or, once in four times, bytes of no format."""
    if generator.randrange(4) == 0:
        return generator.randbytes(generator.randrange(300))
    pieces = [generator.choice((generator.randbytes(generator.randint(1, 8)), *SNIPPETS)) for _ in range(6)]
    edits = [(generator.choice(EDITS), generator.random(), piece) for piece in pieces[: generator.randint(1, 6)]]
    return edited(generator.choice(SEEDS[kind]), edits)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder in memory, where there is one: a hundred thousand inputs are written there."""
    memory = "/dev/shm"
    where = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where) as name, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(Path(name) / "cache"))
        yield Path(name)


def in_file(folder: Path, name: str, contents: bytes) -> Path:
    (folder / name).write_bytes(contents)
    return folder / name


def decodes(contents: bytes, _folder: Path) -> None:
    for decode in (decode_pcm, decode_audio):
        with suppress(AudioError):
            assert len(decode(contents, RATE)) > 0
    with suppress(UnusableError):
        AudioLocation("a", contents, 0.01, 0.05, 0).read()


def scans(contents: bytes, _folder: Path) -> None:
    position = 0
    for found in read_members(TarReader(io.BytesIO(contents), len(contents)), "a.tar"):
        assert isinstance(found, Member | TarDamage)
        assert found.offset >= position
        position = found.offset


def parses_utterance(contents: bytes, _folder: Path) -> None:
    with suppress(UnusableError), unusable_on_failure():
        tar_utterance(parse_span(contents), "place", UtteranceLayout())
    # As a data worker reads it, which turns any exception into a bad utterance; it must end.
    with suppress(Exception):
        parse_utterance(contents, UtteranceLayout())


def reads_lines(contents: bytes, folder: Path) -> None:
    in_file(folder, "m.jsonl", contents)
    with suppress(UserError):
        reads_corpus(MANIFEST, str(folder / "m.jsonl"))


def reads_array(contents: bytes, folder: Path) -> None:
    in_file(folder, "m.json", b"[" + contents.replace(b"\n", b",") + b"]")
    with suppress(UserError):
        reads_corpus(MANIFEST, str(folder / "m.json"))


def reads_table(contents: bytes, folder: Path) -> None:
    in_file(folder, "t.csv", contents)
    with suppress(UserError):
        reads_corpus(CSV, str(folder / "t.csv"))


def reads_corpus(importer: Importer, source: str) -> None:
    for line in importer.open(source, CorpusOptions()).read():
        assert isinstance(line, Utterance | Refusal)


def finds_frames(contents: bytes, _folder: Path) -> None:
    with suppress(UnusableError):
        frames = find_mp3_frames(contents, is_known=True)
        assert frames is None or len(frames.contents) <= len(contents)


def reads_wav_sizes(contents: bytes, _folder: Path) -> None:
    sizes = read_wav_sizes(io.BytesIO(contents))
    assert sizes is None or 0 <= sizes.num_bytes <= len(contents)


def parses_json(contents: bytes, _folder: Path) -> None:
    with suppress(ValueError):
        json.dumps(parse_json(contents))


def parses_yaml(contents: bytes, _folder: Path) -> None:
    with suppress(ValueError):
        parse_yaml(contents.decode("utf-8", "surrogateescape"))


def reads_metrics(contents: bytes, folder: Path) -> None:
    metrics = split_metrics(in_file(folder, "metrics.jsonl", contents))
    assert len(metrics.rows) + len(metrics.damaged) == contents.count(b"\n")


def reads_hypotheses(contents: bytes, folder: Path) -> None:
    with suppress(UserError):
        read_hypotheses(in_file(folder, "h.jsonl", contents))


def reads_skipped(contents: bytes, folder: Path) -> None:
    read_skipped(in_file(folder, "skipped.jsonl", contents))


def prints(contents: bytes, _folder: Path) -> None:
    text = contents.decode("utf-8", "replace")
    shown = printable(text)
    assert printable(shown) == shown
    assert masked(masked(text)) == masked(text)
    assert one_line(shown).replace("\u00a0", " ").count("\n") == 0


def reads_index(contents: bytes, folder: Path) -> None:
    """A mutated shard table, and the same bytes as records."""
    home = folder / "set"
    if not home.exists():
        home.mkdir()
        (home / "a.tar").write_bytes(UTTERANCE + tar_end(len(UTTERANCE)))
        size = (home / "a.tar").stat().st_size
        write_index(home, [Shard(str(home / "a.tar"), 3, size, "0")], np.zeros(3, dtype=RECORD), ["en"])
        # The format without a checksum, which would refuse every mutation before its values are read.
        table = json.loads((home / SHARD_TABLE_FILE).read_text())
        del table["checksum"]
        (home / SHARD_TABLE_FILE).write_text(json.dumps(table | {"format": 3}, indent=1))
        for name in (INDEX_FILE, SHARD_TABLE_FILE):
            (folder / name).write_bytes((home / name).read_bytes())
    for name in (INDEX_FILE, SHARD_TABLE_FILE):
        for other in (INDEX_FILE, SHARD_TABLE_FILE):
            (home / other).write_bytes((folder / other).read_bytes())
        whole = (home / name).read_bytes()
        at = sum(contents) % len(whole)
        (home / name).write_bytes(whole[:at] + contents[:20] + whole[at + len(contents[:20]) :])
        with suppress(UserError):
            read_index([str(home)])


def resumes_packing(contents: bytes, folder: Path) -> None:
    home = folder / "pack"
    home.mkdir(exist_ok=True)
    (home / "a.tar").write_bytes(b"12345")
    shard = {"location": "a.tar", "num_utterances": 1, "num_bytes": 5, "sha256": "0"}
    row = {"shard": shard, "num_lines": 1, "languages": [], "record_bytes": 24, "skipped_bytes": 0}
    line = json.dumps(row).encode()
    at = sum(contents) % len(line)
    (home / ".packing.records").write_bytes(bytes(24))
    (home / ".packing.jsonl").write_bytes(b'{"source": "a"}\n' + line[:at] + contents[:12] + line[at:] + b"\n")
    with suppress(UserError):
        PackingJournal(home, {"source": "a"}).close()


TARGETS: dict[str, tuple[str, Callable[[bytes, Path], None]]] = {
    "audio": ("audio", decodes),
    "tar": ("tar", scans),
    "utterance": ("tar", parses_utterance),
    "MP3 frames": ("audio", finds_frames),
    "WAV sizes": ("audio", reads_wav_sizes),
    "manifest": ("json", reads_lines),
    "JSON array": ("json", reads_array),
    "table": ("table", reads_table),
    "json": ("json", parses_json),
    "yaml": ("yaml", parses_yaml),
    "metrics": ("metrics", reads_metrics),
    "hypotheses": ("hypotheses", reads_hypotheses),
    "skipped": ("json", reads_skipped),
    "printed text": ("text", prints),
    "index": ("json", reads_index),
    "journal": ("json", resumes_packing),
}


@pytest.mark.parametrize("target", TARGETS)
def test_mutated_inputs_raise_only_what_is_expected(target: str, folder: Path) -> None:
    kind, read = TARGETS[target]
    for number in range(NUM_EXAMPLES):
        # Each input by itself, so that one can be tried again without those before it.
        contents = drawn_input(random.Random(f"{SEED} {target} {number}"), kind)
        try:
            read(contents, folder)
        except BaseException as error:
            error.add_note(
                f"This is input {number} of the target {target!r} with VOXTRAL_FUZZ_SEED={SEED}: {contents!r}"
            )
            raise
