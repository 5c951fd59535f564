"""A `run_dir` that ranks do not share is refused on all of them, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from voxtral_dist.distributed.world import World
from voxtral_dist.errors import UserError
from voxtral_dist.training.run_checks import refuse_unshared

from ranks import run_ranks


def refusal(world: World, folders: list[Path]) -> tuple[str, int] | None:
    try:
        refuse_unshared(folders[world.rank], world)
    except UserError as error:
        return str(error), error.exit_code
    return None


def test_a_shared_folder_is_accepted_and_left_as_it_was(tmp_path: Path) -> None:
    assert run_ranks(2, refusal, 2 * [tmp_path]) == [None, None]
    assert list(tmp_path.iterdir()) == []


def test_ranks_with_a_folder_of_their_own_are_named_on_all_ranks(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("shared", "other", "shared")]
    for folder in set(folders):
        folder.mkdir()
    refusals = run_ranks(3, refusal, folders)
    for sentence, exit_code in refusals:
        assert "the ranks [1] (1 of 3) do not see what rank 0 writes" in sentence
        assert exit_code == 2
    assert list(folders[0].iterdir()) == []


def test_a_folder_that_is_gone_is_refused_on_all_ranks(tmp_path: Path) -> None:
    refusals = run_ranks(2, refusal, 2 * [tmp_path / "gone"])
    for sentence, exit_code in refusals:
        assert sentence.endswith("cannot be written: no such file or directory.")
        assert exit_code == 74
