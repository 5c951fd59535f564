"""`doctor --distributed` on real ranks of two hosts, of which one is not as it should be."""

from __future__ import annotations

import contextlib
import io
import shutil
import socket
import time
from pathlib import Path
from types import SimpleNamespace

from voxtral_dist.config import RunConfig
from voxtral_dist.diagnosis import facts
from voxtral_dist.distributed.world import World
from voxtral_dist.doctor import examine_hosts

from ranks import run_ranks
from runs import run_config

SECONDS_AHEAD = 5


def _examine(world: World, config: RunConfig, worst: Path | None) -> tuple[int, str]:
    """The exit code and what is printed; ranks 0 and 1 are on one host, 2 and 3 on another one."""
    name = "beta" if world.rank >= 2 else "alpha"
    socket.gethostname = lambda: name
    if world.rank >= 2 and worst is not None:
        now = time.time
        time.time = lambda: now() + SECONDS_AHEAD
        shutil.disk_usage = lambda _folder: SimpleNamespace(free=64 * 10**6)
        facts.package_versions = lambda: {"torch": "0.1"}
        config = config.model_copy(update={"run_dir": worst, "seed": 7})
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = examine_hosts(config, 4, world)
    return code, printed.getvalue()


def test_a_run_whose_hosts_are_alike(tmp_path: Path, tiny_model: Path, shard_folder: Path) -> None:
    config = run_config(tmp_path / "run", tiny_model, shard_folder, num_steps=3)
    (tmp_path / "run").mkdir()
    (code, printed), *others = run_ranks(4, _examine, config, None)
    assert others == 3 * [(code, "")]
    wrong, table, links = printed.split("\n\n")
    # Which of two processes writes faster is chance on a busy machine.
    assert all("the median of all hosts" in line for line in wrong.splitlines()[1:]), printed
    rows = {line.split()[0]: line.split() for line in table.splitlines()}
    assert (rows["alpha"][1], rows["beta"][1]) == ("2", "2")
    assert [line.partition("  ")[0] for line in links.splitlines()] == ["ranks of", "alpha, beta", "alpha", "beta"]
    assert list((tmp_path / "run").iterdir()) == []


def test_what_is_wrong_with_a_host_is_said_first(tmp_path: Path, tiny_model: Path, shard_folder: Path) -> None:
    config = run_config(tmp_path / "run", tiny_model, shard_folder, num_steps=3)
    (tmp_path / "run").mkdir()
    (tmp_path / "other").mkdir()
    results = run_ranks(4, _examine, config, tmp_path / "other")
    assert [code for code, _ in results] == [2, 2, 2, 2]
    printed = results[0][1]
    wrong = printed[: printed.index("\n\n")]
    for sentence in (
        "`run_dir`: the ranks [2, 3] (2 of 4) do not see what rank 0 writes",
        "beta: `seed` is 7, but 0 on rank 0",
        "beta: /dev/shm has 64 MB free",
        "beta: torch 0.1, but ",
        f"beta: its clock is {SECONDS_AHEAD}.0 s ahead of alpha's",
    ):
        assert sentence in wrong, printed
