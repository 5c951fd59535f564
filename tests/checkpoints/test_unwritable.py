"""A save that cannot be finished ends on all ranks with one sentence, and leaves what was saved before as it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from voxtral_dist.config import RunConfig
from voxtral_dist.distributed.world import World, alone
from voxtral_dist.errors import UserError

from ranks import run_ranks
from runs import run_config
from states import LAYOUTS, files_limited_to, save_steps

CPU = alone("cpu")


@pytest.fixture
def config(tiny_model: Path, shard_folder: Path, tmp_path: Path) -> RunConfig:
    (tmp_path / "run").mkdir()
    return run_config(tmp_path / "run", tiny_model, shard_folder, num_steps=4)


def refusal_while_rank_1_cannot_write(world: World, config: RunConfig, layout: str) -> tuple[int, str]:
    save_steps(world, config, layout, (1,))
    with pytest.raises(UserError) as refused, files_limited_to(100_000 if world.rank == 1 else 10**9):
        save_steps(world, config, layout, (2,))
    return refused.value.exit_code, str(refused.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_that_cannot_write_ends_all_with_one_sentence(config: RunConfig, layout: str) -> None:
    refusals = run_ranks(2, refusal_while_rank_1_cannot_write, config, layout)
    assert refusals[0] == refusals[1]
    code, sentence = refusals[0]
    assert code == 74
    assert "step-0000002 cannot be written: " in sentence
    assert "(rank 1). What" in sentence
    assert "What was saved before is as it was" in sentence
    assert [path.name for path in (config.run_dir / "checkpoints").iterdir()] == ["step-0000001"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_that_is_gone_does_not_come_back(config: RunConfig, layout: str) -> None:
    shutil.rmtree(config.run_dir)
    with pytest.raises(UserError, match=r"cannot be written: no such file or directory\.") as refused:
        save_steps(CPU, config, layout, (1,))
    assert refused.value.exit_code == 74
    assert not config.run_dir.exists()


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_disk_without_room_is_refused_before_anything_is_written(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(CPU, config, "whole", (1,))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(UserError, match=r"it needs .* GB, but 1e-06 GB are free"):
        save_steps(CPU, config, "whole", (2,))
    assert [path.name for path in (config.run_dir / "checkpoints").iterdir()] == ["step-0000001"]


def folder_of_rank(world: World, config: RunConfig, layout: str, folders: list[Path]) -> str:
    own = config.model_copy(update={"run_dir": folders[world.rank]})
    # As on a node with a disk of its own.
    (own.run_dir / "checkpoints" / ".step-0000001.tmp").mkdir(parents=True) if world.rank == 1 else None
    with pytest.raises(UserError) as refused:
        save_steps(world, own, layout, (1,))
    return str(refused.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_that_rank_0_does_not_see_make_no_checkpoint(config: RunConfig, layout: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    sentences: list[Any] = run_ranks(2, folder_of_rank, config, layout, [config.run_dir, tmp_path / "other"])
    assert sentences[0].replace(str(config.run_dir), "") == sentences[1].replace(str(tmp_path / "other"), "")
    assert "rank 0 does not see what rank 1 wrote" in sentences[0]
    assert not list(config.run_dir.glob("checkpoints/step-*"))
