"""Ranks that never come, and ranks that are gone, end all others with one sentence and one exit code."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist

from voxtral_dist.cli import main as cli
from voxtral_dist.cli.main import console
from voxtral_dist.distributed import failures, heartbeats, nccl
from voxtral_dist.distributed.world import joined_world

from ranks import Ended, run_programs
from runs import free_port

LIMIT_SECONDS = 60
LOST = 76


@pytest.fixture(autouse=True)
def meeting_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))


def _run(
    rank: int, folder: Path, absent: int | None, killed: int | None, waits_in: str, start: float, limit: float
) -> None:
    """Stands for a program whose ranks meet, and wait for a rank that is gone. Ranks 0 and 1 are on one host."""
    # What is printed after a rank was killed, too.
    os.dup2(os.open(folder / f"said-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    socket.gethostname = lambda: "host-b" if rank == 2 else "host-a"
    os.environ["LOCAL_RANK"] = "1" if rank == 1 else "0"
    failures.SILENT_SECONDS = heartbeats.SILENT_SECONDS = 2.5
    if rank == absent:
        os._exit(0)

    def work(_parsed: object) -> NoReturn:
        with joined_world(timedelta(seconds=limit), timedelta(seconds=start)):
            dist.all_reduce(torch.ones(1))
            if rank == killed:
                # In the first second, after one sign of life.
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(2)
            if waits_in == "collective":
                dist.all_reduce(torch.ones(1))
            if waits_in == "kernel of NCCL" and rank == 0:
                failures.failed_collective = lambda: "timeout"
            os.read(os.pipe()[0], 1)
        raise AssertionError("unreachable")

    parser = cli.build_parser()
    cli.build_parser = lambda: parser
    parser.parse_args = lambda _arguments: type("Parsed", (), {"command": "train", "run": staticmethod(work)})()
    console([])


@pytest.fixture
def end(tmp_path: Path) -> Callable[..., list[Ended]]:
    def run(**options: object) -> list[Ended]:
        wanted = {"absent": None, "killed": None, "waits_in": "collective", "start": 30.0, "limit": 40.0} | options
        ended = run_programs(3, _run, tmp_path, *wanted.values(), limit_seconds=LIMIT_SECONDS)
        return [Ended(one.code, (tmp_path / f"said-{rank}").read_text()) for rank, one in enumerate(ended)]

    return run


def test_a_rank_that_never_comes_is_named_once_on_each_host(end) -> None:
    ended = end(absent=1, start=3.0)
    assert [one.code for one in ended] == [LOST, 0, LOST]
    for one in (ended[0], ended[2]):
        assert "Nothing was heard of the ranks [1] (1 of 3) within " in one.output
        assert "there are ranks on host-a, host-b." in one.output
        assert "Rerun the same command on all hosts to resume." in one.output
        assert one.output.count("voxtral-dist: error: ") == 1
        assert "Traceback" not in one.output


def test_a_first_rank_that_never_comes_is_named(end) -> None:
    ended = end(absent=0, start=3.0)
    assert [one.code for one in ended] == [0, LOST, LOST]
    for one in ended[1:]:
        assert "has not reached rank 0 at 127.0.0.1:" in one.output
        assert "Traceback" not in one.output


@pytest.mark.parametrize(
    ("waits_in", "limit"), [("collective", 40.0), ("kernel of NCCL", 40.0), ("kernel that never ends", 5.0)]
)
def test_a_killed_rank_ends_others_whatever_they_wait_for(end, waits_in: str, limit: float) -> None:
    ended = end(killed=2, waits_in=waits_in, limit=limit)
    assert [one.code for one in ended] == [LOST, LOST, -signal.SIGKILL]
    assert "Nothing is heard of 1 of 3 ranks (2 on host-b since " in ended[0].output
    assert "Traceback" not in ended[0].output
    assert "error" not in ended[1].output, "rank 0 on the same host says it"


def test_a_killed_rank_is_seen_by_another_one_of_its_host_long_before_it_is_missed(end) -> None:
    ended = end(killed=1, waits_in="kernel that never ends", limit=3000.0)
    assert [one.code for one in ended] == [LOST, -signal.SIGKILL, LOST]
    for one in (ended[0], ended[2]):
        assert "Nothing is heard of 1 of 3 ranks (1 on host-a since " in one.output
        assert one.output.count("voxtral-dist: error: ") == 1


@pytest.mark.parametrize("waits_in", ["collective", "kernel that never ends"])
def test_the_loss_of_the_rank_that_hosts_the_store_ends_others(end, waits_in: str) -> None:
    ended = end(killed=0, waits_in=waits_in)
    assert [one.code for one in ended] == [-signal.SIGKILL, LOST, LOST]
    for one in ended[1:]:
        assert "Nothing is heard of rank 0, which keeps the ranks together, on 127.0.0.1 for " in one.output
        assert one.output.count("voxtral-dist: error: ") == 1
        assert "Traceback" not in one.output


def test_a_collective_of_nccl_that_fails_among_living_ranks_ends_all(end) -> None:
    ended = end(waits_in="kernel of NCCL")
    assert [one.code for one in ended] == [LOST, LOST, LOST]
    for one in (ended[0], ended[2]):
        assert "Rank 0 on host-a has waited for another rank in vain (NCCL: timeout)" in one.output


def test_the_watchdog_of_nccl_ends_a_process_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    before = set(os.environ)
    nccl.set_watchdog_limits(timedelta(minutes=10))
    added = {name: os.environ[name] for name in set(os.environ) - before}
    assert 3 * int(added["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"]) <= 600
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0", "the user's"
    known = (Path(torch.__file__).parent / "include/torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp").read_text()
    assert [name for name in added if f'"{name}"' not in known] == []


def test_an_error_of_nccl_is_found_among_all_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._C._distributed_c10d import ErrorType

    class Group:
        error = ErrorType.SUCCESS

        def _get_backend(self, device: torch.device) -> Group:
            assert device.type == "cuda"
            return self

        def get_error(self) -> ErrorType:
            return self.error

    broken = Group()
    groups = {object(): ("gloo", None), Group(): ("nccl", None), broken: ("cpu:gloo,cuda:nccl", None)}
    monkeypatch.setattr(dist.distributed_c10d, "_world", SimpleNamespace(pg_map=groups))
    assert nccl.failed_collective() is None
    broken.error = ErrorType.REMOTE_ERROR
    assert nccl.failed_collective() == "remote error"


def _join_by_agent(rank: int, port: int, counts: tuple[int, ...]) -> NoReturn:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": str(counts[rank]),
    }
    for _ in range(2):
        with joined_world(timedelta(seconds=20), timedelta(seconds=20)) as world:
            total = torch.ones(1)
            dist.all_reduce(total)
            print(int(total), world.size, end=" ", flush=True)
    os._exit(0)


def test_ranks_of_agents_that_counted_other_restarts_meet_whoever_was_there_before() -> None:
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for counts in ((0, 0, 0), (1, 1), (1, 0, 1), (1, 0, 1)):
        size = len(counts)
        ended = run_programs(size, _join_by_agent, agent.port, counts, limit_seconds=60)
        assert ended == size * [Ended(0, f"{size} {size} {size} {size} ")]
