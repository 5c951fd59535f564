"""Ranks that make no progress are found, named and ended, whatever they wait for, with the stacks of all of them."""

import ctypes
import json
import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from voxtral_dist.distributed import failures, watchdog
from voxtral_dist.distributed.standing import Standing, stand
from voxtral_dist.distributed.watchdog import Report, Watchdog, _sentence
from voxtral_dist.distributed.world import joined_world
from voxtral_dist.errors import HangError

from ranks import Ended, run_programs
from runs import free_port

LIMIT_SECONDS = 40
CODE = HangError.exit_code


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def at_pace(seconds: float, num_steps: int = 3) -> tuple[Standing, Clock]:
    """A process that has made some steps of two slots."""
    clock = Clock()
    standing = Standing(clock)
    for step in range(num_steps):
        for phase, slot in (("data", None), ("step", 0), ("step", 1)):
            standing.stand(phase, step, slot, ["key"])
            clock.seconds += seconds
    standing.stand("data", num_steps)
    return standing, clock


def test_a_part_has_five_times_the_longest_one_of_its_kind():
    standing, clock = at_pace(100)
    assert standing.limit(30) == 500
    assert standing.limit(600) == 600, "the floor"
    standing.stand("step", 3, 0)
    assert standing.limit(30) == 500, "a slot, and not a step"
    standing.stand("save", 3)
    assert standing.limit(30) == 180, "until one was measured"
    clock.seconds += 20
    assert standing.age() == 20
    standing.stand("data", 4)
    standing.stand("save", 4)
    assert standing.limit(30) == 100
    standing.advance()
    assert standing.age() == 0


def test_first_steps_are_not_measured_and_the_start_has_no_limit():
    assert Standing().limit(30) == float("inf")
    standing, _ = at_pace(1, num_steps=2)
    standing.stand("step", 2, 0)
    assert standing.limit(30) == 180


def test_time_in_which_the_process_was_stopped_does_not_count():
    standing, clock = at_pace(1)
    clock.seconds += 50
    standing.excuse(45)
    assert standing.age() == 5


class _ReadsForEver(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        os.read(os.pipe()[0], 1)
        return index


def _wait_for_data() -> None:
    stand("data", 7)
    next(iter(DataLoader(_ReadsForEver(), batch_size=None, sampler=[0], num_workers=1)))


def _be_stopped() -> None:
    process, server = os.getpid(), os.getppid()
    ranks = Path(f"/proc/{server}/task/{server}/children")
    if os.fork() == 0:
        # Its end would end the others, so it comes after theirs, on a machine of any speed.
        while {str(process)} < set(ranks.read_text().split()):
            time.sleep(0.1)
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        os._exit(0)
    os.kill(process, signal.SIGSTOP)


def _work_alone() -> None:
    """Stands for the scores of a large test set on rank 0, which all others wait for."""
    for _ in range(50):
        time.sleep(0.1)
        stand("evaluation", 7)
    dist.all_reduce(torch.ones(1))
    os._exit(0)


def _wait_for_it() -> None:
    dist.all_reduce(torch.ones(1))
    os._exit(0)


def _lack_storage() -> None:
    watchdog._STORAGE_SECONDS = 1.0
    watchdog._now = lambda: "now"
    time.sleep(600)


ACTIONS: dict[str, Callable[[], object]] = {
    "collective": lambda: dist.all_reduce(torch.ones(1)),
    "sleeps": lambda: time.sleep(600),
    "waits for data": _wait_for_data,
    "is stopped": _be_stopped,
    # Without `PyDLL`, ctypes would release Python's lock.
    "holds the lock": lambda: ctypes.PyDLL(None).sleep(600),
    "works alone": _work_alone,
    "waits for it": _wait_for_it,
    "lacks storage": _lack_storage,
}


def _program(rank: int, actions: tuple[str, ...], folder: Path, port: int) -> NoReturn:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    watchdog._TICK_SECONDS = failures._POLL_SECONDS = 0.3
    watchdog._PUBLISH_SECONDS, watchdog._SILENT_SECONDS = 0.3, 2.0
    watchdog._STORE_SECONDS, watchdog._STOPPED_SECONDS, watchdog._LOCK_SECONDS = 3.0, 2.0, 7.0
    with joined_world() as world, Watchdog(folder, 1.5, world) as dog:
        dist.all_reduce(torch.ones(1))
        stand("step", 3)
        # Its threads have run once.
        while dog._beat == 0 and world.size > 1:
            time.sleep(0.05)
        time.sleep(1.2)
        for step in range(4, 7):
            stand("data", step)
            stand("step", step, rank, ["first", "second"])
        stand("data", 7)
        stand("step", 7, rank, ["third"])
        # Published before the rank may be kept from it.
        time.sleep(0.7)
        ACTIONS[actions[rank]]()
    os._exit(0)


@pytest.fixture
def end(tmp_path: Path) -> Callable[..., list[Ended]]:
    def run(*actions: str) -> list[Ended]:
        return run_programs(len(actions), _program, actions, tmp_path, free_port(), limit_seconds=LIMIT_SECONDS)

    return run


def stacks(folder: Path) -> dict[str, str]:
    """The files of the only hang."""
    (hang,) = (path for path in folder.glob("hangs/*") if path.is_dir())
    return {path.name: path.read_text() for path in hang.iterdir()}


def test_a_rank_that_sleeps_is_named_and_all_stacks_are_written(end, tmp_path):
    ended = end("collective", "sleeps", "collective")
    assert [one.code for one in ended] == [CODE] * 3
    (line,) = ended[0].output.splitlines()
    assert re.search(r"No rank has made progress for \d+ s \(`distributed.watchdog_seconds`\), so the run ends: ", line)
    assert "rank 1 on " in line
    assert "(step 7, slot 1) is in <lambda> (tests/distributed/test_watchdog.py:" in line
    assert "2 ranks" not in line, "they are in different slots"
    assert line.count("waits for other ranks in all_reduce (torch/distributed/distributed_c10d.py:") == 2
    assert line.index("rank 1 on") < line.index("rank 0 on"), "the odd one comes first"
    written = stacks(tmp_path)
    assert set(written) == {"rank-00000.txt", "rank-00001.txt", "rank-00002.txt", "ranks.json"}
    assert written["rank-00001.txt"].startswith("Rank 1 on ")
    assert "Utterances: third" in written["rank-00001.txt"]
    for text in (written["rank-00000.txt"], written["rank-00002.txt"]):
        assert "in all_reduce" in text
        assert text.count("\nThread 0x") + text.count("\nCurrent thread 0x") >= 3
    assert [one["doing"] for one in json.loads(written["ranks.json"])["ranks"]] == ["collective", "other", "collective"]


def test_waiting_for_data_is_told_from_waiting_for_others(end, tmp_path):
    ended = end("waits for data", "collective")
    assert [one.code for one in ended] == [CODE] * 2
    assert "(step 7) waits for its data workers; rank 1 on" in ended[0].output
    assert re.search(r"Data worker .*process \d+, State: S", stacks(tmp_path)["rank-00000.txt"])


@pytest.mark.parametrize(
    ("actions", "code_of_silent"),
    [
        pytest.param(("collective", "is stopped", "collective"), -9, id="stopped"),
        pytest.param(("collective", "holds the lock", "collective"), 1, id="lock is held", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_cannot_answer_is_found_by_the_others(end, tmp_path, actions, code_of_silent):
    first, silent, last = end(*actions)
    assert (first.code, silent.code, last.code) == (CODE, code_of_silent, CODE)
    assert "rank 1 on " in first.output
    assert ", slot 1) gives no sign of life; rank " in first.output
    written = stacks(tmp_path)
    assert re.search(r"process \d+, State: ", written["rank-00001.txt"])
    if code_of_silent == 1:
        assert "in <lambda>" in (tmp_path / "hangs" / "lock-00001.txt").read_text()


def test_ranks_whose_store_does_not_answer_end_alone(end, tmp_path):
    first, *others = end("is stopped", "collective", "collective")
    assert (first.code, *(one.code for one in others)) == (-9, CODE, CODE)
    # Whoever ends first has said it; a launcher ends the other one.
    said = "".join(one.output for one in others)
    assert "Rank 0, which keeps the ranks together, does not answer on 127.0.0.1. No rank has" in said
    assert set(stacks(tmp_path)) == {"rank-00001.txt", "rank-00002.txt"}


def test_storage_that_does_not_answer_keeps_no_rank(end, tmp_path):
    hang = tmp_path / "hangs" / "step-0000007-now"
    hang.mkdir(parents=True)
    for rank in range(2):
        # Whoever opens it for writing waits for a reader.
        os.mkfifo(hang / f"rank-{rank:05d}.txt")
    ended = end("lacks storage", "lacks storage")
    assert [one.code for one in ended] == [CODE] * 2
    assert "rank 1 on " in ended[0].output
    assert f"Stacks could not be written to {hang}. Rerun" in ended[0].output


def test_a_rank_that_works_for_all_is_waited_for(end, tmp_path):
    assert [one.code for one in end("works alone", "waits for it", "waits for it")] == [0, 0, 0]
    assert not [path for path in tmp_path.glob("hangs/*") if path.is_dir()]


def test_a_process_without_others_ends_itself(end, tmp_path):
    (ended,) = end("sleeps")
    assert ended.code == CODE
    assert "rank 0 on " in ended.output
    assert set(stacks(tmp_path)) == {"rank-00000.txt"}


def test_ranks_at_one_place_are_named_together_in_the_plural():
    waiting, stopped = (
        [Report(rank, "a", 1, 1, "step", 7, 0, (), 400.0, True, "collective", "all_reduce (x.py:1)") for rank in ranks]
        for ranks in ((0, 1), (2, 3))
    )
    assert (
        "2 ranks (2, 3) (step 7, slot 0) give no sign of life; "
        "2 ranks (0, 1) (step 7, slot 0) wait for other ranks in all_reduce (x.py:1). "
    ) in _sentence(waiting, stopped, 300.0, Path("hangs"), is_taken=True)
