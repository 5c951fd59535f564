"""Corpora and tars behind URLs are packed, indexed and verified as those in folders."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from voxtral_dist.config import StorageConfig
from voxtral_dist.data.stored.checks import MAX_CHARS_PER_SECOND
from voxtral_dist.data.stored.index import read_index
from voxtral_dist.data.stored.layout import UtteranceLayout
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.errors import ReadError, UserError
from voxtral_dist.shards.corpus import audio_location
from voxtral_dist.shards.corpus.corpus import open_corpus
from voxtral_dist.shards.corpus.options import CorpusOptions
from voxtral_dist.shards.indexing import index_tars
from voxtral_dist.shards.packing import PackOptions, pack
from voxtral_dist.shards.summary import SetSummary
from voxtral_dist.shards.verification import verify

from corpora import write_lines
from servers import file_server
from stored import decoded_in


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Iterator[pytest.MonkeyPatch]:
    """Cache remote files in a folder of this test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield patch


@pytest.fixture(scope="module")
def s3(environment, s3_environment, shard_folder) -> str:
    for name, value in s3_environment.items():
        environment.setenv(name, value)
    bucket = fsspec.filesystem("s3")
    for tar in shard_folder.glob("*.tar"):
        bucket.pipe(f"corpus/tars/{tar.name}", tar.read_bytes())
    return "s3://corpus"


@pytest.fixture(scope="module")
def web(environment, shard_folder, speech_manifest) -> Iterator[str]:
    with file_server() as running:
        running.files.update({f"tars/{tar.name}": tar.read_bytes() for tar in shard_folder.glob("*.tar")})
        audio = speech_manifest.parent / "audio"
        running.files.update({f"audio/{clip.name}": clip.read_bytes() for clip in audio.iterdir()})
        yield running.url


def index(pattern: str, out: Path | None) -> SetSummary:
    return index_tars(pattern, out, UtteranceLayout(), MAX_CHARS_PER_SECOND, num_workers=1)


@pytest.fixture(params=["s3 folder", "s3 glob", "web"])
def tars(request, shard_folder) -> str:
    if request.param == "web":
        last = len(list(shard_folder.glob("*.tar"))) - 1
        return f"{request.getfixturevalue('web')}/tars/speech-{{000000..{last:06d}}}.tar"
    folder = f"{request.getfixturevalue('s3')}/tars"
    return folder if request.param == "s3 folder" else f"{folder}/*-0*.tar"


def test_the_index_of_remote_tars_is_that_of_local_ones(tars, shard_folder, tmp_path):
    index(tars, tmp_path)
    ours, theirs = read_index([str(shard_folder)]), read_index([str(tmp_path)])
    assert [shard.sha256 for shard in theirs.shards] == [shard.sha256 for shard in ours.shards]
    assert all(shard.location.startswith(tars.partition("/tars")[0]) for shard in theirs.shards)
    np.testing.assert_array_equal(theirs.records, ours.records)
    assert decoded_in(tmp_path) == decoded_in(shard_folder)
    assert [broken for run in verify(str(tmp_path), 1) for broken in run.broken] == []


def test_remote_tars_are_a_source(tars, shard_folder, tmp_path):
    pack(open_corpus(tars, CorpusOptions()), tmp_path / "out", PackOptions())
    assert decoded_in(tmp_path / "out") == decoded_in(shard_folder)


def test_a_manifest_may_name_audio_behind_urls(web, speech_manifest, tmp_path):
    rows = [json.loads(line) for line in speech_manifest.read_text(encoding="utf-8").splitlines()][:6]
    local = write_lines(tmp_path / "local.jsonl", [row | {"offset": 0.1, "duration": 0.2} for row in rows[3:]] + rows)
    shutil.copytree(speech_manifest.parent / "audio", tmp_path / "audio")
    remote = [
        json.loads(line) | {"audio_filepath": f"{web}/{json.loads(line)['audio_filepath']}"}
        for line in local.read_text(encoding="utf-8").splitlines()
    ]
    found = []
    for manifest in (local, write_lines(tmp_path / "remote.jsonl", remote)):
        out = tmp_path / manifest.stem
        pack(open_corpus(str(manifest), CorpusOptions()), out, PackOptions())
        found.append([(one.text, one.language, one.pcm) for one in decoded_in(out)])
    assert found[0] == found[1]
    assert len(found[0]) == 9


def test_audio_that_a_server_does_not_have_is_skipped(web, tmp_path):
    rows = [{"audio": f"{web}/audio/{name}", "text": "x"} for name in ("nowhere.wav", "0_001.wav")]
    manifest = write_lines(tmp_path / "m.jsonl", rows)
    summary = pack(open_corpus(str(manifest), CorpusOptions()), tmp_path / "out", PackOptions(skip_bad=True))
    assert (summary.num_utterances, summary.skipped.causes) == (1, {"unreadable": 1})
    assert "nowhere.wav" in summary.skipped.first_reasons[0]


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("tars/speech-000000.tar", "pass a folder for their index"),
        ("tars/nowhere.tar", "nowhere.tar"),
        ("nowhere", "nowhere"),
    ],
)
def test_remote_tars_that_cannot_be_indexed_are_one_sentence(s3, tmp_path, pattern, sentence):
    with pytest.raises(UserError) as refused:
        index(f"{s3}/{pattern}", None if pattern.startswith("tars/s") else tmp_path)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_fails_ends_a_packing_that_skips_bad_utterances(speech_manifest, tmp_path, monkeypatch):
    """Else all utterances would be listed as broken, and the set of the others would be complete."""
    monkeypatch.setattr(audio_location, "_storage", lambda: Storage(StorageConfig(num_attempts=1)))
    clip = next((speech_manifest.parent / "audio").iterdir())
    with file_server() as running:
        running.files[clip.name] = clip.read_bytes()
        rows = [{"audio": f"{running.url}/{clip.name}", "text": text} for text in ("", "a", "b")]
        source = str(write_lines(tmp_path / "m.jsonl", rows))
        running.lasting_fault = "503"
        with pytest.raises(ReadError, match=rf"{clip.name} cannot be read: .*status 503.* none is skipped"):
            pack(open_corpus(source, CorpusOptions()), tmp_path / "out", PackOptions(skip_bad=True))
        running.lasting_fault = None
        summary = pack(open_corpus(source, CorpusOptions()), tmp_path / "out", PackOptions(skip_bad=True))
    assert (summary.num_utterances, summary.skipped.causes) == (2, {"empty text": 1})


def test_a_disk_that_fails_ends_a_verification_without_calling_utterances_broken(shard_folder, monkeypatch):
    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(ReadError, match=r"Input/output error\. Its storage fails"):
        list(verify(str(shard_folder), 1))
