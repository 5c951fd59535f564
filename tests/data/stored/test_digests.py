"""Checksums of large files, computed once per node until a file changes."""

import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from voxtral_dist.config import StorageConfig
from voxtral_dist.data.stored.index import read_index
from voxtral_dist.data.stored.index_files import INDEX_FILE
from voxtral_dist.data.stored.storage import Storage, digests
from voxtral_dist.data.stored.storage.digests import NodeDigests
from voxtral_dist.errors import UserError
from voxtral_dist.shards.verification import verify


@pytest.fixture
def computed(monkeypatch) -> list[str]:
    """The names of the files whose checksums were computed; files count as settled at once."""
    monkeypatch.setattr(digests, "_SETTLED_SECONDS", float("-inf"))
    names: list[str] = []
    compute = hashlib.file_digest

    def counted(file, algorithm):
        names.append(Path(file.name).name)
        return compute(file, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    return names


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 5000)
    return path


def expected(path: Path, start: int) -> str:
    return hashlib.sha256(path.read_bytes()[start:]).hexdigest()


def test_all_processes_of_a_node_compute_a_checksum_once(file, computed, tmp_path):
    # Each has a descriptor of its own, so threads wait for the lock as processes do.
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: NodeDigests(tmp_path / "node").digest(file, 100), range(8)))
    assert found == [expected(file, 100)] * 8
    assert computed == ["file"]


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[::-1])
    status = path.stat()
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)


def changed_in_place(path: Path) -> None:
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(7)
        file.write(b"x")
    # The time of the last change of attributes tells.
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [replaced, changed_in_place, lambda path: path.write_bytes(b"short")])
def test_a_changed_file_is_read_again(file, computed, tmp_path, change):
    node = NodeDigests(tmp_path / "node")
    assert node.digest(file, 0) == expected(file, 0)
    change(file)
    assert node.digest(file, 0) == expected(file, 0)
    assert node.digest(file, 0) == expected(file, 0)
    assert computed == ["file", "file"]


def test_a_file_that_changed_just_now_is_not_remembered(file, computed, tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_SETTLED_SECONDS", 2.0)
    node = NodeDigests(tmp_path / "node")
    node.digest(file, 0)
    node.digest(file, 0)
    assert computed == ["file", "file"]


@pytest.mark.parametrize("contents", [b"", b"{", b"[]", b'{"identity": 1}', b"\xff" * 9000])
def test_a_damaged_entry_is_written_again(file, computed, tmp_path, contents):
    node = NodeDigests(tmp_path / "node")
    node.digest(file, 0)
    (entry,) = (tmp_path / "node").iterdir()
    entry.write_bytes(contents)
    assert [node.digest(file, 0) for _ in range(2)] == [expected(file, 0)] * 2
    assert len(computed) == 2


def test_without_a_place_for_entries_every_process_computes(file, computed, tmp_path):
    (tmp_path / "node").write_text("a file in place of the folder")
    assert NodeDigests(tmp_path / "node").digest(file, 3) == expected(file, 3)


def test_verify_reads_the_whole_index_even_where_the_node_knows_it(shard_folder, computed, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    read_index([shard_folder])
    read_index([shard_folder])
    assert computed == [INDEX_FILE]
    next(verify(str(shard_folder), 1))
    assert computed == [INDEX_FILE] * 2


def test_a_damaged_copy_is_refused_by_verify(shard_folder, tmp_path):
    folder = shutil.copytree(shard_folder, tmp_path / "set")
    with (folder / INDEX_FILE).open("r+b") as file:
        file.seek(-200, os.SEEK_END)
        file.write(b"damage")
    with pytest.raises(UserError, match="another checksum"):
        verify(str(folder), 1)


@pytest.fixture
def in_memory(shard_folder):
    """The shards in fsspec's file system in memory, which all tests share."""
    memory = fsspec.filesystem("memory")
    for path in shard_folder.iterdir():
        memory.pipe(f"/digests/{path.name}", path.read_bytes())
    yield "memory://digests"
    memory.rm("/digests", recursive=True)


def test_a_remote_set_is_compared_through_its_copy(in_memory, computed, tmp_path):
    storage = Storage(StorageConfig(cache_dir=tmp_path))
    assert len(read_index([in_memory], storage)) == 26
    assert computed == [next(tmp_path.glob("entries/*index.npy")).name]
