"""Training from S3 or a web server gives the same batches as from local files, even when requests fail."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from voxtral_dist.config import StorageConfig, TrainDataConfig
from voxtral_dist.data.examples.micro_batch import MicroBatch
from voxtral_dist.data.loader import build_train_loader
from voxtral_dist.data.stored.index import read_index
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.errors import ReadError, UserError

from servers import FileServer, file_server


@pytest.fixture
def s3_folder(s3_environment: dict[str, str], shard_folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The shards and their index on a real S3 server."""
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    s3 = fsspec.filesystem("s3")
    for file in shard_folder.iterdir():
        s3.pipe(f"corpus/speech/{file.name}", file.read_bytes())
    return "s3://corpus/speech"


@pytest.fixture
def web_server(shard_folder: Path) -> Iterator[FileServer]:
    with file_server() as running:
        running.files.update({f"speech/{file.name}": file.read_bytes() for file in shard_folder.iterdir()})
        yield running


def micro_batches(shards: str, prompts, storage: Storage, num_workers: int = 0) -> list[str]:
    """A digest of each micro-batch of four steps, which are more than an epoch."""
    config = TrainDataConfig(
        shards=(shards,), slots_per_step=2, max_examples=5, megabatch_steps=2, num_workers=num_workers
    )
    loader = build_train_loader(config, prompts, 0, 4, 0, 1, storage)
    return [digest(batch) for batches in loader.starting_at(0) for batch in batches.micro_batches]


def digest(batch: MicroBatch) -> str:
    assert batch.bad_utterances == ()
    return hashlib.sha256(batch.pcm.numpy().tobytes() + batch.input_ids.numpy().tobytes()).hexdigest()


def storage_in(folder: Path, **changes) -> Storage:
    return Storage(StorageConfig(cache_dir=folder, timeout_seconds=2, **changes))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("shards", ["s3://corpus/speech", "s3://corpus/{speech,speech}", "s3://corpus/sp*"])
def test_a_bucket_gives_the_batches_of_the_folder(s3_folder, shard_folder, prompts, tmp_path, shards, num_workers):
    local = micro_batches(str(shard_folder), prompts, Storage())
    assert micro_batches(shards, prompts, storage_in(tmp_path), num_workers) == local


def test_a_brace_range_of_tars_in_a_bucket_is_a_part_of_the_set(s3_folder, shard_folder, prompts, tmp_path):
    tars = "speech-{000000..000001}.tar"
    local = micro_batches(f"{shard_folder}/{tars}", prompts, Storage())
    assert micro_batches(f"{s3_folder}/{tars}", prompts, storage_in(tmp_path)) == local


def test_a_web_server_with_faults_gives_the_batches_of_the_folder(web_server, shard_folder, prompts, tmp_path):
    local = micro_batches(str(shard_folder), prompts, Storage())
    web_server.faults.extend(["503", "short", "cut", "stall", "close", "503"])
    assert micro_batches(f"{web_server.url}/speech", prompts, storage_in(tmp_path)) == local
    assert not web_server.faults, "every fault was used"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_step_before_one_that_cannot_be_read_says_so(web_server, prompts, num_workers):
    config = TrainDataConfig(
        shards=(f"{web_server.url}/speech",), slots_per_step=3, max_examples=5, num_workers=num_workers
    )
    storage = Storage(StorageConfig(num_attempts=1, prefetch_megabytes=0))
    web_server.seconds_per_request = 0.02
    with build_train_loader(config, prompts, 0, 40, 0, 1, storage).starting_at(0) as steps:
        first = next(steps)
        assert first.read_error is None
        web_server.lasting_fault = "503"
        last = next(step for step in steps if step.upcoming is None or step.upcoming.read_error is not None)
        assert last.step < 39
        assert last.upcoming is not None
        assert len(last.upcoming.micro_batches) == 3, "as many as on the ranks that can read theirs"
        assert not any(batch.num_utterances for batch in last.upcoming.micro_batches)
        with pytest.raises(ReadError, match=r"speech-\d+\.tar cannot be read at byte \d+: .*status 503"):
            next(steps)


def test_an_index_that_no_server_gives_may_come_later(web_server, tmp_path):
    web_server.lasting_fault = "503"
    with pytest.raises(ReadError, match="status 503") as refused:
        read_index([f"{web_server.url}/speech"], storage_in(tmp_path, num_attempts=1))
    assert refused.value.exit_code == 74


def test_a_second_epoch_over_a_cached_set_asks_the_server_for_no_bytes(web_server, prompts, tmp_path):
    first = micro_batches(f"{web_server.url}/speech", prompts, storage_in(tmp_path))
    asked = web_server.ranges()
    assert micro_batches(f"{web_server.url}/speech", prompts, storage_in(tmp_path)) == first
    again = web_server.ranges() - asked
    assert {path for path, _ in asked} > {path for path, _ in again}
    assert {Path(path).name for path, _ in again} == {"shards.json"}, "the table is small and is read each time"


def test_a_folder_that_is_not_in_the_bucket_is_refused(s3_folder, prompts, tmp_path):
    with pytest.raises(UserError, match="s3://corpus/nothing"):
        micro_batches("s3://corpus/nothing", prompts, storage_in(tmp_path, num_attempts=1))


@pytest.mark.parametrize("missing", ["shards.json", "index.npy"])
def test_a_web_folder_without_its_index_is_refused(web_server, tmp_path, missing):
    del web_server.files[f"speech/{missing}"]
    with pytest.raises(UserError, match=r"has no complete index \(shards\.json and index\.npy\)"):
        read_index([f"{web_server.url}/speech"], storage_in(tmp_path, num_attempts=1))


@pytest.mark.parametrize("pattern", ["{url}/nowhere", "{url}/speech/{{a,b}}.tar", "http://127.0.0.1:1/set"])
def test_remote_shards_that_are_missing_are_one_sentence(web_server, tmp_path, pattern):
    with pytest.raises(UserError) as refused:
        read_index([pattern.format(url=web_server.url)], storage_in(tmp_path, num_attempts=1))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("pattern", ["s3://corpus/nothing*", "s3://no-such-bucket/x", "s3://no-such-bucket/*"])
def test_a_bucket_that_is_missing_is_one_sentence(s3_folder, tmp_path, pattern):
    with pytest.raises(UserError, match="s3://"):
        read_index([pattern], storage_in(tmp_path, num_attempts=1))
