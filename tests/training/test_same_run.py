"""Ranks that would train something else than rank 0 are refused on all ranks, with the key and both values."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import voxtral_dist.train
from voxtral_dist.config import RunConfig
from voxtral_dist.distributed.world import World
from voxtral_dist.errors import UserError
from voxtral_dist.training import same_run
from voxtral_dist.training.same_run import refuse_different_runs

from ranks import run_ranks
from runs import ROOT, run_config

# Configuration, `--allow-changed`, versions of packages, fingerprint of the source.
Start = tuple[RunConfig, list[str], dict[str, str], str]


def _refusals(world: World, starts: list[list[Start]]) -> list[tuple[str, int] | None]:
    """Message and exit code of each start, given for each rank as its four parts."""
    found: list[tuple[str, int] | None] = []
    socket.gethostname = lambda: f"host-{world.rank}"
    for of_ranks in starts:
        config, allow_changed, versions, source = of_ranks[world.rank]
        same_run.package_versions = lambda versions=versions: versions
        same_run._source_fingerprint = lambda source=source: source
        try:
            refuse_different_runs(config, allow_changed, world)
            found.append(None)
        except UserError as error:
            found.append((str(error), error.exit_code))
    return found


@pytest.fixture
def start(tmp_path: Path, tiny_model: Path) -> Callable[..., Start]:
    def build(
        model: Path = tiny_model,
        allow_changed: list[str] | None = None,
        torch: str = "2.11.0",
        source: str = "aa",
        **changes: object,
    ) -> Start:
        config = run_config(tmp_path, model, tmp_path, num_steps=5)
        tree = config.model_dump(mode="json")
        for dotted, value in changes.items():
            section = tree
            *parents, leaf = dotted.split("__")
            for parent in parents:
                section = section[parent]
            section[leaf] = value
        return RunConfig.model_validate(tree), allow_changed or [], {"torch": torch}, source

    return build


def test_each_kind_of_difference_is_refused_on_all_ranks(start, tmp_path: Path, tiny_model: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(tiny_model, copied)
    edited = tmp_path / "edited.json"
    settings = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    settings["zero_optimization"]["contiguous_gradients"] = False
    edited.write_text(json.dumps(settings))
    usual = start()
    cases = [
        (start(optimizer__learning_rate=1e-3), "`optimizer.learning_rate` is 0.002 on rank 0 (host-0), but 0.001 on"),
        (start(seed=7), "`seed` is 0 on rank 0 (host-0), but 7 on"),
        (start(num_steps=6), "`num_steps` is 5 on rank 0 (host-0), but 6 on"),
        (start(checkpoint__every_steps=2), "`checkpoint.every_steps` is 500 on rank 0 (host-0), but 2 on"),
        (
            start(train_data__shards=[str(tmp_path), "more"]),
            "`train_data.shards.1` is (absent) on rank 0 (host-0), ",
        ),
        (start(engine__deepspeed=str(edited)), "`zero_optimization.contiguous_gradients` in DeepSpeed's file is "),
        (start(allow_changed=["seed"]), "`--allow-changed` is [] on rank 0 (host-0), but ['seed'] on"),
        (start(torch="2.12.0"), "the version of torch is 2.11.0 on rank 0 (host-0), but 2.12.0 on"),
        (start(source="bb"), "the fingerprint of voxtral-dist's source files is aa on rank 0 (host-0), but bb on"),
        (start(model=copied), "`model.path` is "),
    ]
    refusals = run_ranks(3, _refusals, [[usual, usual, other] for other, _ in cases])
    assert refusals[0] == refusals[1] == refusals[2]
    for found, (_, sentence) in zip(refusals[0], cases, strict=True):
        assert found is not None, sentence
        refusal, exit_code = found
        assert exit_code == 2
        assert refusal.startswith(f"All ranks must start the same run, but {sentence}")
        assert " on the ranks [2] (1 of 3; host-2)" in refusal
        assert refusal.count(" on rank 0 ") == 1, "nothing else differs"


def _refusals_by_folder(world: World, config: RunConfig, folders: list[Path]) -> str | None:
    sys.path.insert(0, str(folders[world.rank]))
    try:
        refuse_different_runs(config, [], world)
    except UserError as error:
        return str(error)
    return None


def test_another_version_of_a_text_step_on_a_host_is_refused_and_so_is_one_that_is_missing_there(
    start, tmp_path: Path
) -> None:
    config = start(train_data__target_text=["host_steps:f"])[0]
    folders = [tmp_path / name for name in ("first", "other", "without")]
    for place, folder in enumerate(folders):
        folder.mkdir()
        (folder / "host_steps.py").write_text(f"def f(text):\n    return text[{place}:]\n")
    (folders[2] / "host_steps.py").unlink()
    refusals = run_ranks(3, _refusals_by_folder, config, folders)
    assert refusals[0] == refusals[1] == refusals[2]
    assert "with versions of your functions, is host_steps:f-" in refusals[0]
    assert "on the ranks [1] (1 of 3" in refusals[0]
    assert "but The text step `host_steps:f`: module host_steps cannot be imported" in refusals[0]


def _refusals_by_model(world: World, configs: list[RunConfig], folders: list[Path]) -> str | None:
    same_run.stored_folder = lambda _path, _name: str(folders[world.rank])
    try:
        refuse_different_runs(configs[world.rank], [], world)
    except UserError as error:
        return str(error)
    return None


def test_other_files_in_the_same_folder_of_a_model_are_refused(start, tmp_path: Path, tiny_model: Path) -> None:
    config = start()[0]
    for changed in ("model.safetensors", "tekken.json"):
        other = tmp_path / changed
        shutil.copytree(tiny_model, other)
        content = bytearray((other / changed).read_bytes())
        content[-20] ^= 1
        (other / changed).write_bytes(content)
        refusals = run_ranks(2, _refusals_by_model, 2 * [config], [tiny_model, other])
        assert refusals[0] == refusals[1]
        assert "the fingerprint of the files of `model.path` is " in refusals[0]
        assert refusals[0].count(" on rank 0 ") == 1


def test_folders_of_a_host_may_differ(start, tmp_path: Path) -> None:
    other = tmp_path / "zero3.json"
    settings = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    other.write_text(json.dumps(settings, indent=8))
    differing = start(
        run_dir="elsewhere", storage__cache_dir="/fast", engine__nvme_dir="/nvme", engine__deepspeed=str(other)
    )
    assert run_ranks(2, _refusals, [[start(), differing]]) == [[None], [None]]


def test_a_model_that_only_some_hosts_have_already_is_not_a_difference(start, tmp_path: Path, tiny_model: Path) -> None:
    config = start()[0]
    assert run_ranks(2, _refusals_by_model, 2 * [config], [tiny_model, tmp_path / "empty"]) == [None, None]


def test_more_differences_than_fit_are_counted(start) -> None:
    other = start(
        seed=1, num_steps=6, optimizer__learning_rate=1e-3, optimizer__warmup_steps=1, checkpoint__keep=9, torch="2.12"
    )
    refusal, _ = run_ranks(2, _refusals, [[start(), other]])[0][0]
    assert refusal.count(" on rank 0 ") == 4
    assert "; and 2 more differences. Start the same command" in refusal


def _checked(world: World, config: RunConfig) -> str:
    config = config.model_copy(update={"seed": world.rank})
    with pytest.raises(UserError) as refusal:
        voxtral_dist.train.train(config, world)
    return str(refusal.value)


def test_training_compares_before_it_loads_anything(start, tmp_path: Path) -> None:
    """The model of this configuration does not exist."""
    config = start(model=tmp_path / "no model")[0]
    for refusal in run_ranks(2, _checked, config):
        assert "`seed` is 0 on rank 0" in refusal
