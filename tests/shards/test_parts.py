"""A set that several machines pack in parts is, merged, the set that one machine packs."""

import json
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from voxtral_dist.cli.main import build_parser
from voxtral_dist.data.stored.index import read_index
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.errors import UserError
from voxtral_dist.shards import merging
from voxtral_dist.shards.actions import merge_shards, pack_shards
from voxtral_dist.shards.corpus.corpus import open_corpus
from voxtral_dist.shards.corpus.held_out import HeldOut
from voxtral_dist.shards.corpus.options import CorpusOptions
from voxtral_dist.shards.corpus.parts import CorpusPart, count_lines, parse_part, part_of
from voxtral_dist.shards.journal import PackingJournal
from voxtral_dist.shards.merging import merge
from voxtral_dist.shards.packed_utterance import PackRules
from voxtral_dist.shards.packing import PackOptions, PackProgress, pack
from voxtral_dist.shards.removal import remove_set
from voxtral_dist.shards.summary import SetSummary
from voxtral_dist.shards.workers import ordered_map

from corpora import write_lines, write_speech_manifest
from stored import StoppedError, contents_of, decoded_in, read_table, stop_at

SHARD_BYTES = 100_000
NUM_PARTS = 8


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    """60 lines: repeated audio, every ninth unusable, and a language that comes first in a late part."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = [json.loads(line) for line in write_speech_manifest(folder, 30, max_seconds=0.8).open(encoding="utf-8")]
    rows = [dict(row) for row in rows + rows]
    for row in rows[::9]:
        row["audio_filepath"] = "nowhere.wav"
    rows[50]["lang"] = "pt"
    return write_lines(folder / "manifest.jsonl", rows)


def pack_part(
    source: Path,
    out: Path,
    part: CorpusPart | None = None,
    on_progress: Callable[[PackProgress], None] = lambda _: None,
    **options: Any,
) -> SetSummary:
    corpus = open_corpus(str(source), CorpusOptions())
    if part is not None:
        corpus = part_of(corpus, part, count_lines(corpus))
    chosen = PackOptions(**{"shard_bytes": SHARD_BYTES, "skip_bad": True, "part": part, **options})
    return pack(corpus, out, chosen, on_progress)


def pack_parts(source: Path, out: Path, count: int = NUM_PARTS, **options: Any) -> None:
    for number in range(1, count + 1):
        pack_part(source, out, CorpusPart(number, count), **options)


def utterance_bytes(folder: Path) -> list[bytes]:
    index, storage = read_index([str(folder)]), Storage()
    return [storage.read(index.span(number)) for number in range(len(index))]


def table_but_names(folder: Path) -> dict[str, Any]:
    table = read_table(folder)
    shards = [{name: value for name, value in shard.items() if name != "location"} for shard in table["shards"]]
    return {name: value for name, value in table.items() if name != "checksum"} | {"shards": shards}


def records_but_offsets(folder: Path) -> np.ndarray:
    records = np.load(folder / "index.npy")
    records["offset_blocks"] = 0
    return records


@pytest.fixture(scope="module")
def whole(tmp_path_factory, manifest) -> Path:
    """The set of one packing without parts."""
    folder = tmp_path_factory.mktemp("whole") / "set"
    pack_part(manifest, folder)
    return folder


@pytest.fixture(scope="module")
def merged(tmp_path_factory, manifest) -> Path:
    """The set of one process that packs all parts."""
    folder = tmp_path_factory.mktemp("merged") / "set"
    pack_parts(manifest, folder)
    merge(folder)
    return folder


def test_two_processes_make_the_bytes_of_one(tmp_path, manifest, merged):
    work = partial(pack_shards, str(manifest), tmp_path / "set", CorpusOptions())
    parts = [PackOptions(SHARD_BYTES, True, part=CorpusPart(number, NUM_PARTS)) for number in (8, 2, 4, 6, 1, 7, 3, 5)]
    assert list(ordered_map(work, parts, num_workers=2, batch_size=4)) == [0] * NUM_PARTS
    merge(tmp_path / "set")
    assert contents_of(tmp_path / "set") == contents_of(merged)
    assert not list((tmp_path / "set").glob(".*"))


def test_a_merged_set_holds_what_one_packing_without_parts_does(whole, merged):
    assert utterance_bytes(merged) == utterance_bytes(whole)
    assert read_index([str(merged)]).languages == read_index([str(whole)]).languages
    assert (merged / "skipped.jsonl").read_bytes() == (whole / "skipped.jsonl").read_bytes()
    np.testing.assert_array_equal(records_but_offsets(merged), records_but_offsets(whole))
    ours, theirs = table_but_names(merged), table_but_names(whole)
    for differs in ("shards", "records_sha256"):
        del ours[differs], theirs[differs]
    assert ours == theirs


def test_where_shards_end_with_the_parts_the_index_is_equal_but_for_names(tmp_path, manifest):
    pack_part(manifest, tmp_path / "whole", shard_bytes=1)
    pack_parts(manifest, tmp_path / "merged", shard_bytes=1)
    merge(tmp_path / "merged")
    for name in ("index.npy", "skipped.jsonl"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert table_but_names(tmp_path / "merged") == table_but_names(tmp_path / "whole")


@pytest.mark.parametrize(("num_lines", "count"), [(60, 8), (7, 8), (0, 3), (10**8 + 1, 32), (5, 1)])
def test_parts_cover_each_line_once_and_are_equally_long(num_lines, count):
    bounds = [CorpusPart(number, count).bounds(num_lines) for number in range(1, count + 1)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] is None, "the last part has what an estimate missed"
    assert all(end == first for (_, end), (first, _) in pairwise(bounds))
    lengths = [(num_lines if end is None else end) - first for first, end in bounds]
    assert max(lengths) - min(lengths) <= 1


def test_a_corpus_of_unknown_length_is_counted(tmp_path, manifest, merged):
    rows = [json.loads(line) for line in manifest.open(encoding="utf-8")]
    array = manifest.with_suffix(".json")
    array.write_text(json.dumps(rows))
    assert open_corpus(str(array), CorpusOptions()).num_lines is None
    pack_parts(array, tmp_path / "set")
    merge(tmp_path / "set")
    assert decoded_in(tmp_path / "set") == decoded_in(merged)


@pytest.mark.parametrize("stop", [1, 12, 20])
def test_an_interrupted_part_resumes_and_a_finished_one_stays(tmp_path, manifest, stop):
    out, part = tmp_path / "set", CorpusPart(2, 3)
    pack_parts(manifest, tmp_path / "uninterrupted" / "set", 3)
    with pytest.raises(StoppedError):
        pack_part(manifest, out, part, stop_at(stop))
    with pytest.raises(
        UserError, match=r"lacks parts 1/3, 3/3 and has unfinished part 2/3: .* `--part 1/3`, then merge"
    ):
        merge(out)
    pack_parts(manifest, out, 3)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    again = pack_part(manifest, out, part)
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.tar")} == before
    assert again.num_utterances == sum(shard["num_utterances"] for shard in shards_of(out, part))
    for folder in (out, tmp_path / "uninterrupted" / "set"):
        merge(folder)
    assert contents_of(out) == contents_of(tmp_path / "uninterrupted" / "set")


def shards_of(out: Path, part: CorpusPart) -> list[dict[str, Any]]:
    lines = (out / f".part-{part.name}" / ".packing.jsonl").read_text().splitlines()
    return [row["shard"] for row in map(json.loads, lines[1:]) if "shard" in row]


def test_parts_that_are_packed_at_once_leave_each_other_alone(tmp_path, manifest, merged):
    out = tmp_path / "set"

    def others(at: PackProgress) -> None:
        if at.num_lines == 3:
            for number in range(2, NUM_PARTS + 1):
                pack_part(manifest, out, CorpusPart(number, NUM_PARTS))
            with pytest.raises(UserError, match="Another process is packing into"):
                pack_part(manifest, out, CorpusPart(1, NUM_PARTS))

    pack_part(manifest, out, CorpusPart(1, NUM_PARTS), others)
    merge(out)
    assert contents_of(out) == contents_of(merged)


def test_an_interrupted_merge_is_finished_by_another(tmp_path, manifest, merged, monkeypatch):
    out = tmp_path / "set"
    pack_parts(manifest, out)

    def stop(*_: object) -> None:
        raise StoppedError

    for name in ("write_index", "_remove_states"):
        with monkeypatch.context() as patch:
            patch.setattr(merging, name, stop)
            with pytest.raises(StoppedError):
                merge(out)
    # A removal that was killed leaves some journals, and folders without one.
    (out / ".part-1-of-8" / ".packing.jsonl").unlink()
    with pytest.raises(UserError, match="holds a complete shard set already"):
        pack_part(manifest, out, CorpusPart(2, NUM_PARTS))
    assert merge(out)[str(out)].num_utterances == len(read_index([str(merged)]))
    assert contents_of(out) == contents_of(merged)
    with pytest.raises(UserError, match=r"holds no parts: .* is a complete shard set already"):
        merge(out)


def test_parts_may_be_empty_but_not_all(tmp_path, manifest):
    rows = [json.loads(line) for line in manifest.open(encoding="utf-8")]
    few = write_lines(manifest.parent / "few.jsonl", [rows[0], rows[1], rows[9]])
    pack_parts(few, tmp_path / "set", 5)
    assert merge(tmp_path / "set")[str(tmp_path / "set")].num_utterances == 1
    assert (tmp_path / "set" / "skipped.jsonl").read_bytes().count(b"\n") == 2
    bad = write_lines(manifest.parent / "bad.jsonl", [rows[0], rows[9]])
    pack_parts(bad, tmp_path / "bad", 2)
    with pytest.raises(UserError, match=r"are all empty: .*the first was skipped: .*bad\.jsonl:1: .*nowhere"):
        merge(tmp_path / "bad")


def test_a_bad_line_ends_only_its_part(tmp_path, manifest):
    out = tmp_path / "set"
    pack_part(manifest, out, CorpusPart(2, 30), skip_bad=False)
    with pytest.raises(UserError, match=f"{manifest}:10: .* pass --skip-bad"):
        pack_part(manifest, out, CorpusPart(5, 30), skip_bad=False)
    with pytest.raises(UserError, match=r"lacks parts 1/30, 3/30, 4/30, 5/30, .* and 19 more"):
        merge(out)


def remove_a_tar(out: Path) -> None:
    next(out.glob("*-3-of-4-*.tar")).unlink()


def cut_records(out: Path) -> None:
    records = out / ".part-3-of-4" / ".packing.records"
    records.write_bytes(records.read_bytes()[:-24])


def garble_journal(out: Path) -> None:
    journal = out / ".part-3-of-4" / ".packing.jsonl"
    journal.write_bytes(b"garbled\n" + journal.read_bytes())


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (remove_a_tar, r"The part 3/4 in .* lacks its file set-3-of-4-00000\d\.tar, or"),
        (cut_records, r"The part 3/4 in .* lacks its file \.part-3-of-4/\.packing\.records, or"),
        (garble_journal, r"The journal of the part 3/4 in .* is damaged"),
    ],
)
def test_a_damaged_part_is_named_and_packed_again_by_overwrite(tmp_path, manifest, whole, damage, sentence):
    out = tmp_path / "set"
    pack_parts(manifest, out, 4)
    others = {path for path in out.rglob("*") if "-3-of-4" not in str(path)}
    damage(out)
    with pytest.raises(UserError, match=sentence):
        merge(out)
    remove_set(out, part=CorpusPart(3, 4))
    assert set(out.rglob("*")) == others
    pack_part(manifest, out, CorpusPart(3, 4))
    merge(out)
    assert utterance_bytes(out) == utterance_bytes(whole)
    remove_set(out)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "options", "sentence"),
    [
        ("same", {"rules": PackRules("flac")}, r"part 3/4 was packed with `encode` 'flac' instead of None in 1/4"),
        ("same", {"shard_bytes": 5}, r"part 3/4 was packed with `shard_bytes` 5 instead of 100000"),
        (
            "changed",
            {},
            r"part 3/4 was packed from the same place with other contents .*again by --overwrite, by the same",
        ),
    ],
)
def test_a_part_of_another_corpus_or_with_other_options_is_refused(tmp_path, manifest, source, options, sentence):
    out = tmp_path / "set"
    copied = manifest.with_name("copied.jsonl")
    copied.write_bytes(manifest.read_bytes())
    for number in (1, 2, 4):
        pack_part(copied, out, CorpusPart(number, 4))
    if source == "changed":
        copied.write_bytes(manifest.read_bytes() + b"\n")
    pack_part(copied, out, CorpusPart(3, 4), **options)
    with pytest.raises(UserError, match=sentence):
        merge(out)
    assert not (out / "shards.json").exists()


def test_packings_of_other_divisions_do_not_share_a_folder(tmp_path, manifest):
    out = tmp_path / "set"
    pack_part(manifest, out, CorpusPart(1, 4))
    with pytest.raises(UserError, match="holds the part 1/4 of a set that several machines pack"):
        pack_part(manifest, out, CorpusPart(1, 5))
    with pytest.raises(UserError, match="holds the part 1/4 of a set that several machines pack"):
        pack_part(manifest, out)
    with pytest.raises(StoppedError):
        pack_part(manifest, tmp_path / "one", on_progress=stop_at(5))
    with pytest.raises(UserError, match="that was packed without --part"):
        pack_part(manifest, tmp_path / "one", CorpusPart(1, 4))


def test_a_held_out_set_is_that_of_one_machine(tmp_path, manifest, capsys, caplog):
    held_out = HeldOut(0.2)
    pack_shards(str(manifest), tmp_path / "one", CorpusOptions(), PackOptions(skip_bad=True), held_out)
    for number in range(1, 6):
        options = PackOptions(skip_bad=True, part=CorpusPart(number, 5))
        pack_shards(str(manifest), tmp_path / "many", CorpusOptions(), options, held_out)
    capsys.readouterr()
    caplog.clear()
    merge_shards(tmp_path / "many")
    printed = capsys.readouterr().out
    # What the parts warned of holds for the whole.
    assert ["have no language" in record.getMessage() for record in caplog.records] == [True, True]
    for side in ("train", "dev"):
        assert utterance_bytes(tmp_path / "many" / side) == utterance_bytes(tmp_path / "one" / side)
        assert f"{tmp_path / 'many' / side}:\n" in printed
        skipped = (tmp_path / "one" / side / "skipped.jsonl").read_bytes()
        assert (tmp_path / "many" / side / "skipped.jsonl").read_bytes() == skipped


def test_a_training_set_is_not_merged_without_its_development_set(tmp_path, manifest):
    for number, fraction in ((1, 0.2), (2, 0.4)):
        options = PackOptions(skip_bad=True, part=CorpusPart(1, 1))
        pack_shards(str(manifest), tmp_path / str(number), CorpusOptions(), options, HeldOut(fraction))
    (tmp_path / "1" / "dev").rename(tmp_path / "dev")
    with pytest.raises(UserError, match=r"The folder .*1/dev holds no parts"):
        merge(tmp_path / "1")
    (tmp_path / "2" / "dev").rename(tmp_path / "1" / "dev")
    with pytest.raises(UserError, match="divide different corpora, or by other options"):
        merge(tmp_path / "1")


def test_a_part_is_parsed():
    parsed = build_parser().parse_args(["shards", "pack", "corpus", "out", "--part", "3/32"])
    assert (parsed.part, parsed.part.name) == (CorpusPart(3, 32), "03-of-32")


@pytest.mark.parametrize("text", ["0/4", "5/4", "3", "a/b", "1/0", "-1/4", "1/10001", "1/4/5"])
def test_what_is_no_part_is_refused(text, capsys):
    with pytest.raises(ValueError, match="must be a part from 1, such as 3/32"):
        parse_part(text)
    with pytest.raises(SystemExit):
        build_parser().parse_args(["shards", "pack", "corpus", "out", f"--part={text}"])
    assert "must be a part from 1" in capsys.readouterr().err


def test_the_journal_of_one_machine_stays_in_the_folder(tmp_path):
    PackingJournal(tmp_path, {"source": "a"}).close()
    assert (tmp_path / ".packing.jsonl").exists()
