"""Damaged checkpoints are never loaded, never counted, and never a program; the newest intact one is taken."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from voxtral_dist.checkpoints.complete import COMPLETE, read_complete
from voxtral_dist.checkpoints.directory import CheckpointDirectory, checkpoint_of_run, latest_step
from voxtral_dist.checkpoints.progress import TrainProgress
from voxtral_dist.config import RunConfig
from voxtral_dist.distributed.world import World, alone
from voxtral_dist.engine.fsdp2.dcp_metadata import stored_tensors
from voxtral_dist.errors import UserError

from ranks import run_ranks
from runs import run_config
from states import LAYOUTS, save_steps

CPU = alone("cpu")


@pytest.fixture(scope="module", params=list(LAYOUTS))
def saved(
    request: pytest.FixtureRequest, tiny_model: Path, shard_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunConfig:
    """A run with intact checkpoints of the steps 1 and 2."""
    config = run_config(tmp_path_factory.mktemp("saved"), tiny_model, shard_folder, num_steps=4)
    save_steps(CPU, config, request.param, (1, 2))
    return config


@pytest.fixture
def config(saved: RunConfig, tmp_path: Path) -> RunConfig:
    shutil.copytree(saved.run_dir, tmp_path / "run")
    return saved.model_copy(update={"run_dir": tmp_path / "run"})


def checkpoint(config: RunConfig, step: int) -> Path:
    return config.run_dir / "checkpoints" / f"step-{step:07d}"


def layout_of(config: RunConfig) -> str:
    return read_complete(checkpoint(config, 1)).layout


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def loaded(world: World, config: RunConfig, layout: str) -> tuple[int | None, dict[str, float]]:
    """The step that a run resumes from, and the mean of each parameter that it loads."""
    engine = LAYOUTS[layout](world)
    step = latest_step(config.run_dir, world)
    CheckpointDirectory(config, "", world).load(engine, step)
    return step, engine.loaded


def test_an_intact_checkpoint_is_loaded(config: RunConfig) -> None:
    assert loaded(CPU, config, layout_of(config)) == (2, {"a": 2.0, "b": 2.0, "c": 2.0})
    files = read_complete(checkpoint(config, 2)).files
    assert files.keys() == {path.name for path in checkpoint(config, 2).iterdir()} - {COMPLETE}


@pytest.mark.parametrize("position", [0.0, 0.5, 0.999])
def test_a_flipped_bit_in_any_file_is_found_and_the_older_checkpoint_loaded(
    config: RunConfig, position: float, caplog: pytest.LogCaptureFixture
) -> None:
    layout = layout_of(config)
    for path in sorted(checkpoint(config, 2).iterdir()):
        caplog.clear()
        before = path.read_bytes()
        flip(path, int(position * len(before)))
        assert loaded(CPU, config, layout) == (1, {"a": 1.0, "b": 1.0, "c": 1.0})
        (sentence,) = [record.message for record in caplog.records if record.name.startswith("voxtral_dist")]
        assert path.name in sentence
        assert "now called damaged-step-0000002" in sentence
        # Nothing is lost: the name is all that changed.
        (checkpoint(config, 1).parent / "damaged-step-0000002").rename(checkpoint(config, 2))
        path.write_bytes(before)
    assert loaded(CPU, config, layout)[0] == 2


@pytest.mark.parametrize(
    "content",
    [b"[]", b"{}", b"", b"\xff\xfe", b"null", b"1e999", b"[" * 5000, b'{"format": 2}', b'{"format": "two"}', b'"x'],
)
def test_a_malformed_complete_json_is_damage(
    config: RunConfig, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (checkpoint(config, 2) / COMPLETE).write_bytes(content)
    assert latest_step(config.run_dir, CPU) == 1
    assert "is damaged: its complete.json cannot be read" in caplog.text


def without_checksums(folder: Path, **changes: Any) -> None:
    """Make a checkpoint one of format 1, with other values where given."""
    contents = json.loads((folder / COMPLETE).read_text())
    del contents["checksum"]
    files = {name: file["num_bytes"] for name, file in contents["files"].items() if name != "config.yaml"}
    (folder / COMPLETE).write_text(json.dumps(contents | {"format": 1, "files": files} | changes))


def test_a_checkpoint_with_sizes_only_is_loaded(config: RunConfig) -> None:
    without_checksums(checkpoint(config, 2))
    assert loaded(CPU, config, layout_of(config))[0] == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"progress": []},
        {"progress": {"step": "2"}},
        {"shapes": {"a": [64, -8]}},
        {"shapes": {"a": [64, 8], "z": [3]}},
        {"files": {"../../secret": 3}},
        {"files": {}},
        {"files": [1]},
        {"layout": "other"},
        {"unknown": 1},
    ],
)
def test_a_value_of_the_wrong_type_or_a_missing_file_is_damage(config: RunConfig, changes: dict[str, Any]) -> None:
    without_checksums(checkpoint(config, 2), **changes)
    assert latest_step(config.run_dir, CPU) == 1


def test_a_damaged_header_is_found_without_checksums(config: RunConfig) -> None:
    folder = checkpoint(config, 2)
    without_checksums(folder)
    header = folder / ".metadata" if layout_of(config) == "dcp" else next(folder.glob("*.safetensors"))
    flip(header, 3)
    assert latest_step(config.run_dir, CPU) == 1


def test_a_checkpoint_under_the_name_of_another_step_is_damage(
    config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint(config, 2).rename(checkpoint(config, 7))
    assert latest_step(config.run_dir, CPU) == 1
    assert "its complete.json is that of step 2" in caplog.text


def test_a_checkpoint_of_a_newer_format_is_no_damage(config: RunConfig) -> None:
    (checkpoint(config, 2) / COMPLETE).write_text('{"format": 3, "unknown": []}')
    with pytest.raises(UserError, match="has format 3, but this version reads 2"):
        latest_step(config.run_dir, CPU)
    assert checkpoint(config, 2).is_dir()


def test_where_all_are_damaged_none_is_renamed(config: RunConfig) -> None:
    for step in (1, 2):
        (checkpoint(config, step) / COMPLETE).write_text("[]")
    with pytest.raises(UserError, match="No other checkpoint is left"):
        latest_step(config.run_dir, CPU)
    assert checkpoint(config, 1).is_dir()
    assert checkpoint(config, 2).is_dir()


def test_an_export_takes_the_newest_intact_checkpoint(config: RunConfig) -> None:
    (config.run_dir / "config.yaml").touch()
    assert checkpoint_of_run(config.run_dir, None) == checkpoint(config, 2)
    flip(checkpoint(config, 2) / "config.yaml", 0)
    os.utime(checkpoint(config, 2) / COMPLETE, (1, 1))
    assert checkpoint_of_run(config.run_dir, None) == checkpoint(config, 1)
    with pytest.raises(UserError, match="no intact checkpoint of step 2, which it selected"):
        checkpoint_of_run(config.run_dir, 2)


def test_rotation_counts_intact_checkpoints_only(config: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    one = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"keep": 1})})
    # Newer than what will be saved, and damaged after the start of the run: rotation meets it first.
    directory = CheckpointDirectory(one, "", CPU)
    shutil.copytree(checkpoint(config, 2), checkpoint(config, 9))
    (checkpoint(config, 9) / "config.yaml").write_text("")
    save_steps(CPU, one, layout_of(config), (3,))
    names = {path.name for path in (config.run_dir / "checkpoints").iterdir()}
    assert names == {"step-0000003", "damaged-step-0000009"}
    assert "It is now called damaged-step-0000009" in caplog.text
    assert directory.intact_steps() == [3]


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_rotation_keeps_as_many_as_configured(config: RunConfig, keep: int) -> None:
    some = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"keep": keep})})
    directory = save_steps(CPU, some, layout_of(config), (3, 4))
    assert directory.intact_steps() == [1, 2, 3, 4][-keep:]


def test_weights_that_are_not_finite_are_not_saved(config: RunConfig) -> None:
    engine = LAYOUTS[layout_of(config)](CPU, float("nan"))
    with pytest.raises(UserError, match=r"`a` is not finite after step 3, .* last finite checkpoint is step-0000002"):
        CheckpointDirectory(config, "", CPU).save(engine, TrainProgress(step=3))
    assert not checkpoint(config, 3).exists()


def damaged_on_both(world: World, config: RunConfig, layout: str) -> tuple[int | None, dict[str, float]]:
    save_steps(world, config, layout, (1, 2))
    if world.is_first:
        largest = max(checkpoint(config, 2).glob("state-00001-*"), default=checkpoint(config, 2) / "__1_0.distcp")
        flip(largest, -1)
    return loaded(world, config, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_fall_back_alike(saved: RunConfig, layout: str, tmp_path: Path) -> None:
    config = saved.model_copy(update={"run_dir": tmp_path})
    assert run_ranks(2, damaged_on_both, config, layout) == 2 * [(1, {"a": 1.0, "b": 1.0, "c": 1.0})]


class Program:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_metadata_is_no_program(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Program(tmp_path / "made")))
    with pytest.raises(pickle.UnpicklingError, match=r"it names posix\.mkdir"):
        stored_tensors(tmp_path)
    assert not (tmp_path / "made").exists()
    # DCP would unpickle the bytes of such an entry without a limit.
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({"a": BytesStorageMetadata()})))
    with pytest.raises(pickle.UnpicklingError, match="BytesStorageMetadata"):
        stored_tensors(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(torch.Size([1])))
    with pytest.raises(pickle.UnpicklingError, match="no metadata"):
        stored_tensors(tmp_path)
