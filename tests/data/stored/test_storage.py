"""Bytes from a local file == from a web server == from an object store, whatever the servers do; a cache fetches each
piece once for all processes, never exceeds its limit, and never returns a wrong byte."""

import contextlib
import errno
import fcntl
import gc
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from torch.utils.data import DataLoader

from voxtral_dist.config import StorageConfig
from voxtral_dist.data.stored.storage import (
    MissingFileError,
    ShortReadError,
    Span,
    Storage,
    StorageError,
    UnreachableError,
    is_remote,
    join,
)
from voxtral_dist.errors import ReadError, UserError

from servers import FileServer, file_server

CHUNK_MEGABYTES = 1 / 16
CHUNK_BYTES = 1 << 16
# A chunk has 4 bytes of checksum per 64 KiB.
CHUNK_FILE_BYTES = CHUNK_BYTES + 4
CONTENTS = random.Random(1).randbytes(10 * CHUNK_BYTES + 12_345)
SHARD = "set/x-000000.tar"

processes = multiprocessing.get_context("fork")


def spans_of(location: str, number: int, seed: int = 0, longest: int = 100_000) -> list[Span]:
    generator = random.Random(seed)
    spans = []
    for _ in range(number):
        offset = generator.randrange(len(CONTENTS))
        spans.append(Span(location, offset, generator.randint(0, min(longest, len(CONTENTS) - offset))))
    return spans


def expected(span: Span) -> bytes:
    return CONTENTS[span.offset : span.offset + span.num_bytes]


def quick(**fields) -> Storage:
    return Storage(StorageConfig(**{"timeout_seconds": 5.0, "num_attempts": 3} | fields))


def cached(folder: Path, **fields) -> Storage:
    return quick(cache_dir=folder, cache_chunk_megabytes=CHUNK_MEGABYTES, **fields)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with file_server() as running:
        running.files[SHARD] = CONTENTS
        yield running


@pytest.fixture
def location(request, tmp_path, monkeypatch) -> str:
    """The location of the contents with the protocol that the test requests."""
    match request.param:
        case "local":
            folder = str(tmp_path)
            (tmp_path / "set").mkdir()
            (tmp_path / SHARD).write_bytes(CONTENTS)
        case "http":
            running = request.getfixturevalue("server")
            folder = running.url
        case "s3":
            for name, value in request.getfixturevalue("s3_environment").items():
                monkeypatch.setenv(name, value)
            folder = "s3://corpus"
            fsspec.filesystem("s3").pipe(f"corpus/{SHARD}", CONTENTS)
        case "memory":
            folder = "memory://"
            fsspec.filesystem("memory").pipe(f"/{SHARD}", CONTENTS)
    return join(folder, SHARD)


everywhere = pytest.mark.parametrize("location", ["local", "http", "s3", "memory"], indirect=True)
with_listings = pytest.mark.parametrize("location", ["local", "s3", "memory"], indirect=True)


@everywhere
@pytest.mark.parametrize("is_cached", [False, True])
def test_every_span_is_the_same_bytes_as_in_the_file(location, is_cached, tmp_path):
    storage = cached(tmp_path / "cache") if is_cached else quick()
    for span in [*spans_of(location, 12), Span(location, 0, len(CONTENTS)), Span(location, len(CONTENTS) - 1, 1)]:
        assert storage.read(span) == expected(span)
    assert storage.read_all(location) == CONTENTS
    assert storage.local_copy(location).read_bytes() == CONTENTS


@everywhere
@pytest.mark.parametrize("is_cached", [False, True])
def test_a_span_beyond_the_end_is_an_error_that_names_place_and_offset(location, is_cached, tmp_path):
    storage = cached(tmp_path / "cache") if is_cached else quick()
    offset = len(CONTENTS) - 10
    with pytest.raises(StorageError, match=rf"x-000000\.tar cannot be read at byte {offset}: .*"):
        storage.read(Span(location, offset, 20))


@everywhere
def test_a_missing_file_is_soon_an_error(location, tmp_path):
    started = time.monotonic()
    storage = Storage(StorageConfig(num_attempts=50))
    for read in (lambda name: storage.read(Span(name, 0, 5)), storage.read_all):
        with pytest.raises(MissingFileError, match="o such file"):
            read(location + ".none")
    assert time.monotonic() - started < 10


@with_listings
def test_a_folder_lists_its_files_with_sizes(location):
    assert quick().sizes(location.rpartition("/")[0]) == {"x-000000.tar": len(CONTENTS)}


@with_listings
def test_a_missing_folder_is_an_error(location):
    with pytest.raises(MissingFileError, match="none"):
        quick().sizes(join(location.rpartition("/")[0], "none"))


@with_listings
def test_patterns_stand_for_what_is_there(location):
    storage, folder = quick(), location.rpartition("/")[0]
    assert storage.expand(join(folder, "x-*.tar")) == [location]
    assert storage.expand(join(folder, "x-00000[0-3].tar")) == [location]
    assert [storage.read_all(name) for name in storage.expand(f"{folder[:-1]}?/x*")] == [CONTENTS]
    with pytest.raises(UserError, match=r"none-\*\.tar"):
        storage.expand(join(folder, "none-*.tar"))


def test_braces_count_and_choose(tmp_path):
    storage = quick()
    assert storage.expand("s3://b/{002..000}.tar") == [f"s3://b/00{number}.tar" for number in range(3)]
    assert storage.expand("/set-{b,a}/x.tar") == ["/set-a/x.tar", "/set-b/x.tar"]
    assert storage.expand("https://host/x.tar?part=1") == ["https://host/x.tar?part=1"]
    (tmp_path / "set [1]").mkdir()
    assert storage.expand(str(tmp_path / "set [1]")) == [str(tmp_path / "set [1]")]
    with pytest.raises(UserError, match="brace"):
        storage.expand("/set-{a,b")


@pytest.mark.parametrize(
    ("location", "remote"),
    [
        ("s3://b/x", True),
        ("https://h/x", True),
        ("/a/b", False),
        ("a.tar", False),
        ("file:///a", False),
        ("a/b://c", False),
    ],
)
def test_locations_with_a_protocol_are_remote(location, remote):
    assert is_remote(location) is remote


@pytest.mark.parametrize(
    ("folder", "name", "joined"),
    [
        ("s3://b/set/", "x", "s3://b/set/x"),
        ("/a", "x", "/a/x"),
        ("/a", "s3://b/x", "s3://b/x"),
        ("s3://b", "/a/x", "/a/x"),
    ],
)
def test_join(folder, name, joined):
    assert join(folder, name) == joined


def test_a_file_url_is_a_local_path(tmp_path):
    (tmp_path / "x").write_bytes(b"12345")
    location = f"file://{tmp_path}/x"
    storage = quick()
    assert (storage.read(Span(location, 1, 3)), storage.read_all(location)) == (b"234", b"12345")
    assert storage.local_copy(location) == tmp_path / "x"


def test_users_are_told_what_to_install_or_to_write():
    with pytest.raises(UserError, match=r"pip install 'voxtral-dist\[gcs\]'"):
        quick().read(Span("gs://bucket/x.tar", 0, 5))
    with pytest.raises(UserError, match="`nix://` instead"):
        quick().read(Span("nix://bucket/x.tar", 0, 5))


@pytest.mark.parametrize("faults", [["503", "503"], ["cut"], ["short"], ["close", "429"], ["cut", "503"]])
@pytest.mark.parametrize("is_cached", [False, True])
def test_temporary_faults_change_no_byte(server, faults, is_cached, tmp_path):
    storage = cached(tmp_path / "cache") if is_cached else quick()
    span = Span(f"{server.url}/{SHARD}", 70_000, 50_000)
    server.faults += faults
    assert storage.read(span) == expected(span)
    assert server.faults == []
    assert storage.local_copy(span.location).read_bytes() == CONTENTS


@pytest.mark.parametrize(
    ("fault", "sentence", "num_requests", "error_type"),
    [
        ("503", "status 503", 4, UnreachableError),
        ("429", "status 429", 4, UnreachableError),
        ("403", "status 403", 2, StorageError),
        ("404", "no such file", 2, MissingFileError),
        ("cut", "", 4, UnreachableError),
        ("short", "read 50 bytes instead of 100", 3, ShortReadError),
        ("whole", "whole file", 2, StorageError),
    ],
)
def test_faults_that_stay_are_errors_after_a_limited_number_of_attempts(
    server, fault, sentence, num_requests, error_type
):
    server.lasting_fault = fault
    with pytest.raises(
        StorageError, match=rf"x-000000\.tar cannot be read at byte 7: .*{sentence}.*attempts"
    ) as raised:
        quick(num_attempts=4).read(Span(f"{server.url}/{SHARD}", 7, 100))
    assert type(raised.value) is error_type
    assert server.ranges().total() == num_requests


@pytest.mark.parametrize("fault", ["503", "403", "404", "whole"])
def test_a_shard_that_cannot_be_read_is_no_error_of_an_utterance(server, fault):
    server.lasting_fault = fault
    with pytest.raises(
        ReadError, match=r"x-000000\.tar cannot be read at byte 7: .* rerun the same command to resume\."
    ):
        quick(num_attempts=1).read_indexed(Span(f"{server.url}/{SHARD}", 7, 100))


def test_a_shard_that_ends_early_is_an_error_of_the_utterances_behind_its_end(server):
    with pytest.raises(ShortReadError, match="status 416"):
        quick().read_indexed(Span(f"{server.url}/{SHARD}", len(CONTENTS) + 100, 100))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN])
def test_errors_of_a_disk_are_those_of_no_utterance(number, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    path = tmp_path / "x.tar"
    path.write_bytes(CONTENTS)
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(ReadError, match=rf"x\.tar cannot be read: {os.strerror(number)}\. Its storage fails"):
        quick().read_indexed(Span(str(path), 7, 100))


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_stall_times_out_and_the_next_read_succeeds(server, is_cached, tmp_path):
    fields = {"timeout_seconds": 0.4, "num_attempts": 2}
    storage = cached(tmp_path / "cache", **fields) if is_cached else quick(**fields)
    span = Span(f"{server.url}/{SHARD}", 0, 100)
    server.lasting_fault = "stall"
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"no answer within 0\.4 s \(2 attempts\)"):
        storage.read(span)
    storage.prefetch([span])
    with pytest.raises(StorageError, match="no answer"):
        storage.read(span)
    assert time.monotonic() - started < 6
    server.lasting_fault = None
    assert storage.read(span) == expected(span)


def test_a_process_ends_although_reads_ahead_stall(server):
    server.lasting_fault = "stall"

    def announce() -> None:
        Storage().prefetch(spans_of(f"{server.url}/{SHARD}", 30))
        time.sleep(0.3)

    started = time.monotonic()
    child = processes.Process(target=announce)
    child.start()
    child.join(20)
    assert child.exitcode == 0
    assert time.monotonic() - started < 5


def test_sentences_hold_no_secrets(server):
    location = f"{server.url.replace('://', '://user:password@')}/{SHARD}.none?signature=secret"
    for read in (lambda: quick().read(Span(location, 0, 5)), lambda: quick().read_all(location)):
        with pytest.raises(StorageError) as refused:
            read()
        assert not {"password", "secret"} & set(str(refused.value).replace("=", " ").replace(":", " ").split())
        assert "secret" not in str(refused.value)


def test_what_was_read_ahead_is_not_asked_for_again(server):
    storage = quick()
    spans = spans_of(f"{server.url}/{SHARD}", 20)
    storage.prefetch(spans)
    assert [storage.read(span) for span in spans] == [expected(span) for span in spans]
    num_requests = server.ranges().total()
    assert num_requests == len({span for span in spans if span.num_bytes})
    storage.read(spans[0])
    assert server.ranges().total() == num_requests + 1, "a result is returned once, so that none piles up"


def test_neighbours_are_read_by_one_request(server):
    storage, location = quick(), f"{server.url}/{SHARD}"
    spans = [Span(location, 1000 * number, 1000) for number in range(9)] + [Span(location, 50_000, 10)]
    storage.prefetch(random.Random(0).sample(spans, len(spans)))
    assert [storage.read(span) for span in spans] == [expected(span) for span in spans]
    assert set(server.ranges()) == {(f"/{SHARD}", "bytes=0-8999"), (f"/{SHARD}", "bytes=50000-50009")}


def test_a_neighbour_that_fails_spoils_no_other(server):
    storage, location = quick(), f"{server.url}/{SHARD}"
    good, bad = Span(location, len(CONTENTS) - 100, 100), Span(location, len(CONTENTS), 100)
    storage.prefetch([good, bad])
    assert storage.read(good) == expected(good)
    with pytest.raises(StorageError):
        storage.read(bad)


def test_reads_ahead_keep_within_their_limit_and_the_next_ones_replace_them(server):
    storage, location = quick(prefetch_megabytes=0.01), f"{server.url}/{SHARD}"
    spans = [Span(location, 20_000 * number, 4000) for number in range(6)]
    storage.prefetch(spans)
    storage.prefetch(spans[1:])
    time.sleep(0.5)
    asked = {int(part.removeprefix("bytes=").partition("-")[0]) // 20_000 for _, part in server.ranges()}
    assert asked <= {0, 1, 2}
    assert len(storage._here.prefetch._pieces) == 2
    assert [storage.read(span) for span in spans] == [expected(span) for span in spans]


def test_reads_ahead_are_in_flight_together(server):
    server.seconds_per_request = 0.2
    storage = quick(num_reads_in_flight=16)
    spans = [Span(f"{server.url}/{SHARD}", 20_000 * number, 1000) for number in range(16)]
    started = time.monotonic()
    storage.prefetch(spans)
    for span in spans:
        storage.read(span)
    assert time.monotonic() - started < 16 * 0.2 / 3


def test_announced_local_files_need_no_threads(tmp_path):
    (tmp_path / "x.tar").write_bytes(CONTENTS)
    spans = spans_of(str(tmp_path / "x.tar"), 5)
    storage = quick()
    storage.prefetch([*spans, Span(str(tmp_path / "none.tar"), 0, 5)])
    assert storage._here.prefetch._pieces == {}
    assert [storage.read(span) for span in spans] == [expected(span) for span in spans]


def test_a_storage_can_be_sent_to_another_process(server):
    storage = quick()
    span = Span(f"{server.url}/{SHARD}", 5, 500)
    assert storage.read(span) == expected(span)
    assert pickle.loads(pickle.dumps(storage)).read(span) == expected(span)


class Spans:
    """A dataset of the bytes of spans, for the workers of a DataLoader."""

    def __init__(self, storage: Storage, spans: list[Span]) -> None:
        self.storage, self.spans = storage, spans

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, position: int) -> bytes:
        self.storage.prefetch(self.spans[position : position + 4])
        return self.storage.read(self.spans[position])


@pytest.mark.parametrize("location", ["http", "s3", "memory"], indirect=True)
@pytest.mark.parametrize("is_cached", [False, True])
def test_forked_workers_and_their_parent_read_with_the_same_storage(location, is_cached, tmp_path):
    storage = cached(tmp_path / "cache") if is_cached else Storage()
    spans = spans_of(location, 24, longest=20_000)
    started = time.monotonic()
    for _ in range(2):
        storage.prefetch(spans)
        assert storage.read(spans[0]) == expected(spans[0])
        loader = DataLoader(Spans(storage, spans), batch_size=None, num_workers=2, multiprocessing_context="fork")
        assert list(loader) == [expected(span) for span in spans]
        assert [storage.read(span) for span in spans] == [expected(span) for span in spans]
    assert time.monotonic() - started < 20, "no process waits for another process's event loop"


def test_a_forked_process_that_drops_what_it_inherited_leaves_its_parent_its_connections(server):
    # A session closed in a child removes its sockets from the event loop that the child shares with its parent.
    storage, span = Storage(), Span(f"{server.url}/{SHARD}", 5, 500)
    storage.read(span)

    def read_and_drop() -> None:
        nonlocal storage
        storage = pickle.loads(pickle.dumps(storage))
        storage.read(span)
        gc.collect()

    child = processes.Process(target=read_and_drop)
    child.start()
    child.join(20)
    assert child.exitcode == 0
    started = time.monotonic()
    assert storage.read(span) == expected(span)
    assert time.monotonic() - started < 5


def in_processes(number: int, function, *arguments) -> None:
    children = [processes.Process(target=function, args=(rank, *arguments)) for rank in range(number)]
    for child in children:
        child.start()
    for child in children:
        child.join(100)
    assert [child.exitcode for child in children] == [0] * number


def read_and_compare(rank: int, storage: Storage, spans: list[Span]) -> None:
    for span in random.Random(rank).sample(spans, len(spans)):
        assert storage.read(span) == expected(span)


def test_each_chunk_is_fetched_once_for_all_processes(server, tmp_path):
    spans = [*spans_of(f"{server.url}/{SHARD}", 30), Span(f"{server.url}/{SHARD}", 0, len(CONTENTS))]
    server.seconds_per_request = 0.05
    in_processes(4, read_and_compare, cached(tmp_path / "cache"), spans)
    ranges = server.ranges()
    assert len(ranges) == 11
    assert set(ranges.values()) == {1}


def copy_and_compare(rank: int, storage: Storage, location: str) -> None:
    assert storage.local_copy(location).read_bytes() == CONTENTS


def test_a_copy_is_made_once_for_all_processes_and_again_after_a_change(server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    location = f"{server.url}/{SHARD}"
    server.seconds_per_request = 0.1
    in_processes(3, copy_and_compare, quick(), location)
    path = quick().local_copy(location)
    assert server.ranges().total() == 1
    assert path.is_relative_to(tmp_path / "voxtral-dist")
    server.files[SHARD] = CONTENTS[::-1]
    assert quick().local_copy(location).read_bytes() == CONTENTS[::-1]
    assert path.read_bytes() == CONTENTS


def directory_bytes(folder: Path) -> int:
    """The size of all files in a cache: under its lock, none is added or removed, but one may be finished and move."""
    sizes = {}
    with (folder / "usage").open("rb") as usage:
        fcntl.flock(usage, fcntl.LOCK_EX)
        for path in [*(folder / "partial").iterdir(), *(folder / "entries").iterdir()]:
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                sizes[status.st_ino] = status.st_size
    return sum(sizes.values())


def test_a_cache_never_exceeds_its_limit(server, tmp_path):
    limit = 5 * CHUNK_FILE_BYTES
    folder = tmp_path / "cache"
    storage = cached(folder, cache_gigabytes=limit / 1e9)
    spans = spans_of(f"{server.url}/{SHARD}", 60, longest=40_000)
    storage.read(spans[0])
    children = [processes.Process(target=read_and_compare, args=(rank, storage, spans)) for rank in range(3)]
    for child in children:
        child.start()
    sizes = []
    while any(child.is_alive() for child in children):
        sizes.append(directory_bytes(folder))
        time.sleep(0.005)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert max(sizes) <= limit
    assert directory_bytes(folder) > limit / 2
    assert int((folder / "usage").read_text()) == directory_bytes(folder)
    assert len(server.ranges()) == 11


def test_what_was_used_last_stays(server, tmp_path):
    storage = cached(tmp_path / "cache", cache_gigabytes=4 * CHUNK_FILE_BYTES / 1e9)
    location = f"{server.url}/{SHARD}"
    for index in [0, 1, 2, 0, 3, 0, 4, 0, 5, 0]:
        span = Span(location, index * CHUNK_BYTES, 10)
        assert storage.read(span) == expected(span)
        time.sleep(0.02)
    assert server.ranges()[f"/{SHARD}", f"bytes=0-{CHUNK_BYTES - 1}"] == 1


def test_a_copy_in_use_outlives_any_number_of_chunks(server, tmp_path):
    server.files["index.npy"] = bytes(2 * CHUNK_BYTES)
    storage = cached(tmp_path / "cache", cache_gigabytes=5 * CHUNK_FILE_BYTES / 1e9)
    path = storage.local_copy(f"{server.url}/index.npy")
    for span in spans_of(f"{server.url}/{SHARD}", 40):
        assert storage.read(span) == expected(span)
    assert path.read_bytes() == bytes(2 * CHUNK_BYTES)
    assert directory_bytes(tmp_path / "cache") <= 5 * CHUNK_FILE_BYTES


def test_a_copy_that_has_no_room_is_an_error(server, tmp_path):
    with pytest.raises(StorageError, match="cache_gigabytes"):
        cached(tmp_path / "cache", cache_gigabytes=1e-4).local_copy(f"{server.url}/{SHARD}")


def test_an_object_that_changed_is_not_mixed_with_its_old_chunks(server, tmp_path):
    location = f"{server.url}/{SHARD}"
    assert cached(tmp_path / "cache").read(Span(location, 0, 100)) == CONTENTS[:100]
    server.files[SHARD] = CONTENTS[::-1]
    assert cached(tmp_path / "cache").read(Span(location, 0, 100)) == CONTENTS[::-1][:100]


def test_caches_of_other_chunk_sizes_share_a_folder(server, tmp_path):
    server.files[SHARD] = CONTENTS[: 3 * CHUNK_BYTES]
    for num_chunks in (1, 2, 3):
        storage = quick(cache_dir=tmp_path / "cache", cache_chunk_megabytes=num_chunks * CHUNK_MEGABYTES)
        for index in range(3):
            span = Span(f"{server.url}/{SHARD}", index * CHUNK_BYTES, CHUNK_BYTES)
            assert storage.read(span) == expected(span)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "delete"])
def test_a_damaged_chunk_is_fetched_again(server, tmp_path, damage):
    folder, span = tmp_path / "cache", Span(f"{server.url}/{SHARD}", 100, 1000)
    cached(folder).read(span)
    (chunk,) = (folder / "entries").iterdir()
    contents = chunk.read_bytes()
    match damage:
        case "flip":
            chunk.write_bytes(contents[:500] + bytes([contents[500] ^ 1]) + contents[501:])
        case "truncate":
            chunk.write_bytes(contents[:5000])
        case "empty":
            chunk.write_bytes(bytes(len(contents)))
        case "delete":
            chunk.unlink()
    assert cached(folder).read(span) == expected(span)
    assert server.ranges().total() == 2
    assert chunk.read_bytes() == contents


def test_a_killed_download_leaves_nothing_wrong_behind(server, tmp_path):
    folder, span = tmp_path / "cache", Span(f"{server.url}/{SHARD}", 0, 1000)
    other = Span(span.location, 3 * CHUNK_BYTES, 1000)
    server.lasting_fault = "stall"
    children = [
        processes.Process(target=cached(folder, timeout_seconds=60).read, args=(each,)) for each in (span, other)
    ]
    for child in children:
        child.start()
    while len(list((folder / "partial").glob("*"))) < 2 or server.ranges().total() < 2:
        time.sleep(0.02)
    for child in children:
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    server.lasting_fault = None
    assert list((folder / "entries").iterdir()) == []
    assert cached(folder).read(span) == expected(span)
    assert list((folder / "partial").iterdir()) == []
    assert int((folder / "usage").read_text()) == directory_bytes(folder) == CHUNK_FILE_BYTES


def test_a_waiting_process_takes_over_from_a_killed_one(server, tmp_path):
    folder, span = tmp_path / "cache", Span(f"{server.url}/{SHARD}", 0, 1000)
    server.faults = ["stall"]
    first = processes.Process(target=cached(folder, timeout_seconds=60).read, args=(span,))
    first.start()
    while server.ranges().total() < 1:
        time.sleep(0.02)
    second = processes.Process(target=read_and_compare, args=(0, cached(folder), [span]))
    second.start()
    time.sleep(0.5)
    assert server.ranges().total() == 1, "the second process waits for the first"
    os.kill(first.pid, signal.SIGKILL)
    second.join(20)
    first.join()
    assert second.exitcode == 0
    assert server.ranges().total() == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.ENOLCK])
def test_a_disk_that_takes_nothing_is_one_warning(server, tmp_path, monkeypatch, caplog, number):
    storage = cached(tmp_path / "cache")
    spans = spans_of(f"{server.url}/{SHARD}", 5)
    assert storage.read(spans[0]) == expected(spans[0])

    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "ftruncate", refuse)
    monkeypatch.setattr(os, "pwrite", refuse)
    assert [storage.read(span) for span in spans] == [expected(span) for span in spans]
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1
    assert os.strerror(number) in caplog.text


def test_a_full_disk_seen_while_a_chunk_is_written_loses_no_byte(server, tmp_path, monkeypatch):
    storage, span = cached(tmp_path / "cache"), Span(f"{server.url}/{SHARD}", 5, 500)
    storage.read(Span(span.location, 5 * CHUNK_BYTES, 1))
    written, pwrite = [], os.pwrite

    def fill_up(descriptor: int, contents: bytes, offset: int) -> int:
        if len(contents) < CHUNK_BYTES:
            return pwrite(descriptor, contents, offset)
        written.append(pwrite(descriptor, contents[:1000], offset))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", fill_up)
    assert storage.read(span) == expected(span)
    assert written == [1000]
    assert server.ranges().total() == 2, "the fetched bytes are used"
    assert directory_bytes(tmp_path / "cache") == CHUNK_FILE_BYTES


def test_a_cache_folder_that_cannot_be_made_is_a_mistake_of_the_user(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"`storage\.cache_dir` must be a folder"):
        cached(tmp_path / "file").read(Span(f"{server.url}/{SHARD}", 0, 5))


def test_a_local_file_that_is_short_is_soon_an_error(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"12345")
    started = time.monotonic()
    with pytest.raises(ShortReadError, match=r"x\.tar cannot be read at byte 3: read 2 bytes instead of 4"):
        quick().read(Span(str(tmp_path / "x.tar"), 3, 4))
    assert time.monotonic() - started < 2


def test_a_local_file_that_comes_back_is_read(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(CONTENTS)
    storage, span = quick(), Span(str(path), 5, 500)
    storage.read(span)
    shutil.move(path, tmp_path / "away")
    path.write_bytes(b"")
    shutil.move(tmp_path / "away", path)
    assert storage.read(span) == expected(span)
