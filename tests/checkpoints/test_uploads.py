"""Copies of checkpoints at a URL: what is there is what was saved, and a store that is away stops nothing."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from voxtral_dist.checkpoints import uploads as uploads_module
from voxtral_dist.checkpoints.directory import CheckpointDirectory, checkpoint_folder, latest_step
from voxtral_dist.checkpoints.progress import TrainProgress
from voxtral_dist.checkpoints.remote import RemoteCheckpoints, fetch_newest
from voxtral_dist.checkpoints.uploads import CheckpointUploads, build_uploads
from voxtral_dist.config import RunConfig, StorageConfig
from voxtral_dist.data.stored.storage import StorageError
from voxtral_dist.data.stored.storage.remote import Remote
from voxtral_dist.distributed.world import World, alone
from voxtral_dist.errors import SharedWriteError
from voxtral_dist.training.metrics_file import read_metrics

from ranks import run_ranks
from runs import run_config, train_as_users_do
from states import WholeStates

CPU = alone("cpu")
STORAGE = StorageConfig(num_attempts=1, timeout_seconds=5)


@pytest.fixture
def s3(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://corpus/{request.node.name}/run"


@pytest.fixture
def configured(tiny_model: Path, shard_folder: Path, tmp_path: Path) -> Callable[[str, str], RunConfig]:
    def config(name: str, url: str) -> RunConfig:
        (tmp_path / name).mkdir(exist_ok=True)
        return run_config(
            tmp_path / name,
            tiny_model,
            shard_folder,
            num_steps=9,
            checkpoint={"upload": url, "keep": 2},
            storage=STORAGE,
        )

    return config


def save(config: RunConfig, step: int) -> Path:
    directory = CheckpointDirectory(config, "", CPU)
    return directory.save(WholeStates(CPU, float(step)), TrainProgress(step=step))  # type: ignore[arg-type]


def uploaded(config: RunConfig, *steps: int, kept: int | None = None) -> CheckpointUploads:
    uploads = build_uploads(config)
    assert uploads is not None
    for step in steps:
        uploads.offer(step, save(config, step), kept)
        uploads.finish(lambda: None)
    return uploads


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_resumes_on_an_empty_disk_from_what_was_uploaded_last(s3, configured, tmp_path):
    config = configured("first", s3)
    (config.run_dir / "metrics.jsonl").write_text('{"kind": "train", "step": 4}\n')
    (config.run_dir / "best.json").write_text('{"step": 1}')
    (config.run_dir / "evaluations" / "step-0000004").mkdir(parents=True)
    (config.run_dir / "evaluations" / "step-0000004" / "set.json").write_text("{}")
    shutil.copytree(save(config, 1), tmp_path / "best")
    uploads = uploaded(config, 1, 2, 3, 4, kept=1)
    assert [event.values["event"] for event in uploads.events()] == ["uploaded"] * 4
    assert RemoteCheckpoints(s3, STORAGE).steps() == [1, 3, 4], "two, and the best one"
    other = configured("other", s3)
    fetch_newest(other, CPU)
    assert latest_step(other.run_dir, CPU) == 4
    assert contents(checkpoint_folder(other.run_dir, 4)) == contents(checkpoint_folder(config.run_dir, 4))
    assert contents(checkpoint_folder(other.run_dir, 1)) == contents(tmp_path / "best")
    for name in ("metrics.jsonl", "best.json", "evaluations/step-0000004/set.json"):
        assert (other.run_dir / name).read_bytes() == (config.run_dir / name).read_bytes()
    # A machine that was away has an older one.
    shutil.rmtree(checkpoint_folder(other.run_dir, 4))
    fetch_newest(other, CPU)
    assert latest_step(other.run_dir, CPU) == 4


def fetched(world: World, config: RunConfig) -> int | None:
    fetch_newest(config, world)
    return latest_step(config.run_dir, world)


def test_all_ranks_wait_for_the_download(configured, tmp_path):
    url = f"file://{tmp_path}/store/run"
    uploaded(configured("first", url), 3)
    assert run_ranks(2, fetched, configured("other", url)) == [3, 3]


def damage(s3: str, step: int) -> None:
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    prefix = f"{s3.removeprefix('s3://corpus/')}/step-{step:07d}/"
    key = next(
        one["Key"]
        for one in client.list_objects_v2(Bucket="corpus", Prefix=prefix)["Contents"]
        if one["Key"].endswith(".safetensors")
    )
    body = bytearray(client.get_object(Bucket="corpus", Key=key)["Body"].read())
    body[-1] ^= 1
    client.put_object(Bucket="corpus", Key=key, Body=bytes(body))


def test_a_damaged_copy_is_not_used(s3, configured, caplog):
    uploaded(configured("first", s3), 1, 2)
    damage(s3, 2)
    other = configured("other", s3)
    fetch_newest(other, CPU)
    assert latest_step(other.run_dir, CPU) == 1
    assert "The checkpoint of step 2 at " in caplog.text
    assert "is not used: " in caplog.text
    damage(s3, 1)
    with pytest.raises(SharedWriteError, match=r"all checkpoints at .* are damaged: remove them to start over"):
        fetch_newest(configured("third", s3), CPU)


class Unreliable(RemoteCheckpoints):
    """A store that fails some times."""

    def __init__(self, url: str, num_failures: int) -> None:
        super().__init__(url, STORAGE)
        self.num_failures = num_failures
        self.num_uploads = 0
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def upload(self, folder: Path) -> None:
        self.num_uploads += 1
        self.may_go_on.wait()
        if self.num_uploads <= self.num_failures:
            raise StorageError("no answer within 5 s")
        super().upload(folder)


def test_a_store_that_is_away_is_tried_again_and_said_once(configured, tmp_path, monkeypatch):
    monkeypatch.setattr(uploads_module, "_FIRST_PAUSE_SECONDS", 0.01)
    config = configured("run", f"file://{tmp_path}/store")
    uploads = CheckpointUploads(Unreliable(config.checkpoint.upload, 3), config.run_dir, keep=2)
    uploads.offer(1, save(config, 1), None)
    while uploads.steps_in_use():
        uploads.finish(lambda: None)
    events = uploads.events()
    sentences = [event.sentence for event in events if event.sentence and event.values["event"] != "not_uploaded"]
    assert len(sentences) == 2
    assert "step-0000001 cannot be uploaded to " in sentences[0]
    assert "no answer within 5 s. Training goes on, and it is tried again." in sentences[0]
    assert "which works again" in sentences[1]
    assert RemoteCheckpoints(config.checkpoint.upload, STORAGE).steps() == [1]


def test_the_end_of_a_run_does_not_wait_for_a_store_that_is_away(configured, tmp_path):
    config = configured("run", f"file://{tmp_path}/store")
    uploads = CheckpointUploads(Unreliable(config.checkpoint.upload, 100), config.run_dir, keep=2)
    uploads.offer(1, save(config, 1), None)
    uploads.finish(lambda: None)
    uploads.finish(lambda: None)
    first, last = [event.sentence for event in uploads.events()][::2]
    assert "cannot be uploaded" in first
    assert last == f"The checkpoint step-0000001 is in `run_dir` only, and not at file://{tmp_path}/store."


def test_what_is_uploaded_is_not_rotated_away_and_only_the_newest_waits(configured, tmp_path):
    config = configured("run", f"file://{tmp_path}/store")
    remote = Unreliable(config.checkpoint.upload, 0)
    remote.may_go_on.clear()
    uploads = CheckpointUploads(remote, config.run_dir, keep=2)
    directory = CheckpointDirectory(config, "", CPU)
    directory.steps_in_use = uploads.steps_in_use
    for step in range(1, 6):
        saved = directory.save(WholeStates(CPU), TrainProgress(step=step))  # type: ignore[arg-type]
        uploads.offer(step, saved, None)
        while step == 1 and not remote.num_uploads:
            pass
    assert directory.intact_steps() == [1, 4, 5]
    remote.may_go_on.set()
    uploads.finish(lambda: None)
    assert [event.step for event in uploads.events()] == [1, 5]


def test_what_was_written_is_read_back(configured, tmp_path, monkeypatch):
    config = configured("run", f"file://{tmp_path}/store")
    remote, read = RemoteCheckpoints(config.checkpoint.upload, STORAGE), Remote.read
    monkeypatch.setattr(Remote, "read", lambda *arguments: bytes(len(read(*arguments))))
    with pytest.raises(StorageError, match="is not what was uploaded"):
        remote.upload(save(config, 1))
    assert remote.steps() == []


def test_without_a_checkpoint_a_run_does_not_begin_anew_because_the_store_is_away(configured, caplog, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    url = "s3://nowhere/run"
    with pytest.raises(SharedWriteError, match="holds a checkpoint of this run is not known: "):
        fetch_newest(configured("first", url), CPU)
    config = configured("second", url)
    save(config, 1)
    with caplog.at_level(logging.WARNING):
        fetch_newest(config, CPU)
    assert "Checkpoints are not uploaded for now" in caplog.text


class _Stalling(LocalFileSystem):
    protocol = "stalling"
    released = threading.Event()

    def put_file(self, *_arguments: Any, **_options: Any) -> None:
        self.released.wait(30)


def test_a_stalled_store_is_given_up_in_time(configured, tmp_path):
    fsspec.register_implementation("stalling", _Stalling, clobber=True)
    (tmp_path / "file").touch()
    remote = Remote(StorageConfig(num_attempts=1, timeout_seconds=0.2))
    with pytest.raises(StorageError, match=r"cannot be written: no answer within 0\.2 s"):
        remote.upload(tmp_path / "file", f"stalling://{tmp_path}/there/file")
    _Stalling.released.set()


def losses(run_dir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(run_dir / "metrics.jsonl") if row["kind"] == "train"}


def test_a_run_on_an_empty_disk_goes_on_exactly(s3, tiny_model, shard_folder, tmp_path):
    sections: dict[str, Any] = {
        "engine": {"fsdp2": {}},
        "checkpoint": {"upload": s3, "every_steps": 2, "keep": 2},
        "export": {"layouts": []},
    }
    first = run_config(tmp_path / "first", tiny_model, shard_folder, num_steps=4, **sections)
    assert train_as_users_do(first, 1).code == 0
    events = [row for row in read_metrics(first.run_dir / "metrics.jsonl") if row.get("event") == "uploaded"]
    assert [row["step"] for row in events] == [2, 4]
    RemoteCheckpoints(s3, STORAGE).remove(4)
    other = run_config(tmp_path / "other", tiny_model, shard_folder, num_steps=4, **sections)
    ended = train_as_users_do(other, 1)
    assert ended.code == 0
    assert "Downloaded the checkpoint of step 2 from s3://corpus/" in ended.output
    assert json.dumps(losses(other.run_dir)) == json.dumps(losses(first.run_dir))
