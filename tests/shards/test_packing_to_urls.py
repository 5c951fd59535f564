"""A set that is packed to a URL is that of a folder, and any machine resumes its packing."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from voxtral_dist.cli.main import build_parser
from voxtral_dist.data.stored.index import read_index
from voxtral_dist.data.stored.storage.remote import Remote
from voxtral_dist.errors import UserError
from voxtral_dist.shards.actions import merge_shards, pack_shards
from voxtral_dist.shards.corpus.corpus import open_corpus
from voxtral_dist.shards.corpus.held_out import HeldOut
from voxtral_dist.shards.corpus.options import CorpusOptions
from voxtral_dist.shards.corpus.parts import CorpusPart, count_lines, part_of
from voxtral_dist.shards.merging import merge
from voxtral_dist.shards.packing import PackOptions, PackProgress, pack
from voxtral_dist.shards.remote_set import RemoteSet
from voxtral_dist.shards.summary import SetSummary

from corpora import write_lines, write_speech_manifest
from stored import StoppedError, contents_of, stop_at

SHARD_BYTES = 100_000


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    """20 lines, every ninth unusable."""
    folder = tmp_path_factory.mktemp("corpus")
    written = write_speech_manifest(folder, 20, max_seconds=0.8).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in written.splitlines()]
    for row in rows[::9]:
        row["audio_filepath"] = "nowhere.wav"
    return write_lines(folder / "manifest.jsonl", rows)


@pytest.fixture
def url(request, s3_environment, tmp_path, monkeypatch) -> Iterator[str]:
    """A folder of its own for each test, called `set` like those of the folders."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://corpus/{request.node.name.replace('[', '-').strip(']')}/set"


def pack_to(
    manifest: Path,
    out: Path | str,
    part: CorpusPart | None = None,
    on_progress: Callable[[PackProgress], None] = lambda _: None,
    **options: Any,
) -> SetSummary:
    corpus = open_corpus(str(manifest), CorpusOptions())
    if part is not None:
        corpus = part_of(corpus, part, count_lines(corpus))
    chosen = PackOptions(**{"shard_bytes": SHARD_BYTES, "skip_bad": True, "part": part, **options})
    return pack(corpus, out, chosen, on_progress)


def objects_at(url: str) -> dict[str, bytes]:
    """The bytes of all objects, by their path under the URL."""
    bucket = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
    prefix = url.removeprefix("s3://")
    return {name.removeprefix(f"{prefix}/"): bucket.cat_file(name) for name in bucket.find(prefix)}


@pytest.fixture(scope="module")
def local(tmp_path_factory, manifest) -> Path:
    folder = tmp_path_factory.mktemp("local") / "set"
    pack_to(manifest, folder)
    return folder


def test_a_url_gets_the_bytes_of_a_folder(url, manifest, local):
    summary = pack_to(manifest, url)
    assert objects_at(url) == contents_of(local)
    assert (summary.num_utterances, summary.skipped.count) == (17, 3)
    with pytest.raises(UserError, match=f"{url} holds a complete shard set already"):
        pack_to(manifest, url)


def test_another_machine_resumes(url, manifest, local, monkeypatch):
    uploaded: list[str] = []
    upload = Remote.upload

    def noted(remote: Remote, path: Path, location: str) -> None:
        upload(remote, path, location)
        uploaded.append(location.removeprefix(f"{url}/"))

    monkeypatch.setattr(Remote, "upload", noted)
    for stop in (2, 12, 15):
        with pytest.raises(StoppedError):
            pack_to(manifest, url, on_progress=stop_at(stop))
        assert "shards.json" not in objects_at(url)
    with pytest.raises(UserError, match=f"{url} holds an unfinished set that was packed with `shard_bytes`"):
        pack_to(manifest, url, shard_bytes=5)
    pack_to(manifest, url)
    assert objects_at(url) == contents_of(local)
    assert len(uploaded) == len(set(uploaded)), "nothing is uploaded twice"


@pytest.mark.slow
def test_a_packing_killed_between_its_index_and_its_journal_is_complete(url, manifest, local, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(RemoteSet, "discard", lambda _: None)
        pack_to(manifest, url)
    assert objects_at(url).keys() > contents_of(local).keys()
    with pytest.raises(UserError, match="holds a complete shard set already"):
        pack_to(manifest, url, shard_bytes=5)
    assert pack_to(manifest, url).skipped.count == 3
    assert objects_at(url) == contents_of(local)


def test_parts_are_merged_at_the_url(url, manifest, tmp_path):
    parts = [CorpusPart(number, 3) for number in (1, 2, 3)]
    for part in parts:
        pack_to(manifest, tmp_path / "set", part)
    merge(tmp_path / "set")
    pack_to(manifest, url, parts[0])
    with pytest.raises(StoppedError):
        pack_to(manifest, url, parts[2], stop_at(6))
    with pytest.raises(UserError, match=f"The set in {url} lacks parts 2/3, 3/3"):
        merge(url)
    with pytest.raises(UserError, match=f"{url} holds the part 1/3 of a set that several machines pack"):
        pack_to(manifest, url)
    for part in parts:
        pack_to(manifest, url, part)
    summary = merge(url)[url]
    assert objects_at(url) == contents_of(tmp_path / "set")
    assert (summary.num_utterances, summary.skipped.count) == (17, 3)
    assert len(read_index([url])) == 17
    with pytest.raises(UserError, match="holds no parts"):
        merge(url)


def test_a_merge_names_a_shard_that_was_lost(url, manifest):
    pack_to(manifest, url, CorpusPart(1, 1))
    bucket = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
    bucket.rm_file(f"{url}/set-1-of-1-000001.tar")
    with pytest.raises(
        UserError, match=f"The part 1/1 in {url} lacks its file .*1.tar, or .*remove the folder .part-1-of-1 there"
    ):
        merge(url)


@pytest.mark.slow
def test_a_held_out_set_is_packed_to_a_url_in_parts(url, manifest, tmp_path):
    for out in (tmp_path / "set", url):
        options = PackOptions(skip_bad=True, part=CorpusPart(1, 1))
        pack_shards(str(manifest), out, CorpusOptions(), options, HeldOut(0.3))
        assert merge_shards(out) == 0
    for side in ("train", "dev"):
        assert objects_at(f"{url}/{side}") == contents_of(tmp_path / "set" / side)


def test_what_a_url_does_not_offer_is_refused(url, manifest, tmp_path):
    with pytest.raises(UserError, match="--overwrite"):
        pack_shards(str(manifest), url, CorpusOptions(), PackOptions(), overwrite=True)
    with pytest.raises(UserError, match="pass `--part 1/1` too"):
        pack_shards(str(manifest), url, CorpusOptions(), PackOptions(), HeldOut(0.1))
    with pytest.raises(UserError, match=r"The set s3://nowhere/set cannot be written: .*rerun the same") as said:
        pack_to(manifest, "s3://nowhere/set")
    assert "\n" not in str(said.value)
    parsed = build_parser().parse_args(["shards", "pack", "corpus", "s3://bucket/set"])
    assert parsed.out == "s3://bucket/set"
