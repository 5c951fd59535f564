"""When one rank fails, all processes of a run end within seconds and say why, whatever they wait for."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

import voxtral_dist.cli.main as cli
import voxtral_dist.evaluate
import voxtral_dist.train
import voxtral_dist.transcribe
from voxtral_dist.cli.main import console
from voxtral_dist.distributed import failures
from voxtral_dist.distributed.world import World, joined_world
from voxtral_dist.errors import UserError
from voxtral_dist.train import EXIT_STOPPED
from voxtral_dist.training.signals import stop_signals

from ranks import Ended, run_programs
from runs import ROOT, finish, free_port, kill_all, run_config, start_program, write_config

# Ranks that wait forever would be killed then, and fail the test by their exit codes.
LIMIT_SECONDS = 60
MISTAKE = "The shard folder nowhere does not exist."


class _WorkerThatHangs(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        Path(os.environ["WORKERS"], str(os.getpid())).touch()
        os.read(os.pipe()[0], 1)
        return index


class _WorkerThatIsKilled(_WorkerThatHangs):
    def __getitem__(self, _: int) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        os._exit(0)


def _raise(error: BaseException) -> NoReturn:
    raise error


def _spin() -> NoReturn:
    while True:
        pass


def _start_worker(dataset: Dataset[int] | None = None) -> Any:
    return iter(DataLoader(dataset or _WorkerThatHangs(), batch_size=None, sampler=[0], num_workers=1))


def _interrupt_beside_worker() -> NoReturn:
    workers = _start_worker()
    while len(list(Path(os.environ["WORKERS"]).iterdir())) < 2:
        time.sleep(0.1)
    raise KeyboardInterrupt(workers)


def _finish_after(seconds: float, code: int = 0, said: str = "") -> int:
    time.sleep(seconds)
    print(said, end="")
    return code


ACTIONS: dict[str, Callable[[], Any]] = {
    "collective": lambda: dist.all_reduce(torch.ones(1)),
    "store": lambda: dist.distributed_c10d._get_default_store().get("never"),
    # Like a wait for a kernel of NCCL: in C, without Python's lock.
    "call in C": lambda: os.read(os.pipe()[0], 1),
    "Python": _spin,
    "data worker": lambda: next(_start_worker()),
    "killed data worker": lambda: next(_start_worker(_WorkerThatIsKilled())),
    "mistake": lambda: _raise(UserError(MISTAKE)),
    "defect": lambda: {}["key"],
    "no memory": lambda: _raise(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. Including")),
    "Ctrl-C beside a data worker": _interrupt_beside_worker,
    "finish": lambda: 0,
    "broken recording": lambda: 0,
    "finish later": lambda: _finish_after(4),
    "stop": lambda: EXIT_STOPPED,
    "stop later": lambda: _finish_after(3, EXIT_STOPPED),
    "stop later, and say so": lambda: _finish_after(3, EXIT_STOPPED, "Stopped.\n"),
}


def _act(_first: object, world: World, *_more: object, actions: tuple[str, ...]) -> int:
    """Stands for a command's work: ranks meet, then each does something else."""
    dist.all_reduce(torch.ones(1))
    with stop_signals():
        return ACTIONS[actions[world.rank]]()


def _evaluate(*arguments: Any, actions: tuple[str, ...]) -> list[Any]:
    _act(None, arguments[-1], actions=actions)
    return []


def _transcribe(*arguments: Any, actions: tuple[str, ...]) -> list[Any]:
    _act(None, arguments[-1], actions=actions)
    return [UserError("It does not decode.")] if actions[arguments[-1].rank] == "broken recording" else []


def _print_late(seconds: float, print_error: Callable[[UserError], None], error: UserError) -> None:
    time.sleep(seconds)
    print_error(error)


def _program(
    rank: int, command: list[str], actions: tuple[str, ...], hosts: tuple[str, ...], printing: tuple[float, float]
) -> NoReturn:
    if rank == 0:
        cli._print_error = partial(_print_late, printing[0], cli._print_error)
    failures._PRINTING_SECONDS = printing[1]
    os.environ["LOCAL_RANK"] = str(hosts[:rank].count(hosts[rank]))
    socket.gethostname = lambda: hosts[rank]
    voxtral_dist.train.train = partial(_act, actions=actions)
    voxtral_dist.evaluate.evaluate = partial(_evaluate, actions=actions)
    voxtral_dist.transcribe._transcribe_every_nth = partial(_transcribe, actions=actions)
    console(command)


def config_of(folder: Path) -> Path:
    """A configuration whose paths exist, which is all that the command line looks for."""
    for name in ("shards.json", "index.npy"):
        (folder / name).touch()
    return write_config(run_config(folder / "run", folder, folder, num_steps=3))


@pytest.fixture
def end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Ended]]:
    """Runs a command on three ranks until all have ended."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setenv("WORKERS", str(tmp_path / "workers"))
    (tmp_path / "workers").mkdir()
    (tmp_path / "clip.wav").touch()
    config = config_of(tmp_path)
    commands = {
        "train": ["train", "--config", str(config)],
        "evaluate": ["evaluate", *2 * [str(tmp_path)]],
        "transcribe": ["transcribe", str(tmp_path), *2 * [str(tmp_path / "clip.wav")]],
        "refused": ["train", "--config", str(tmp_path / "nowhere.yaml")],
    }

    def run(
        command: str,
        actions: tuple[str, ...] = (),
        hosts: tuple[str, ...] = ("a", "a", "a"),
        printing: tuple[float, float] = (0.0, failures._PRINTING_SECONDS),
    ) -> list[Ended]:
        """`printing`: what rank 0 needs to print an error, and how long ranks wait for others to print, in seconds."""
        return run_programs(3, _program, commands[command], actions, hosts, printing, limit_seconds=LIMIT_SECONDS)

    return run


@pytest.mark.parametrize("command", ["train", "evaluate", "transcribe"])
def test_a_mistake_on_one_rank_is_printed_once_per_node_and_ends_all(end, command):
    ended = end(command, ("collective", "mistake", "store"))
    assert ended == [Ended(2, f"voxtral-dist: error: {MISTAKE}\n"), Ended(2, ""), Ended(2, "")]


def test_a_mistake_on_the_rank_that_hosts_the_store_ends_all(end):
    ended = end("train", ("mistake", "call in C", "collective"))
    assert ended == [Ended(2, f"voxtral-dist: error: {MISTAKE}\n"), Ended(2, ""), Ended(2, "")]


def test_an_unexpected_error_is_named_elsewhere_and_has_its_traceback_on_its_rank(end):
    ended = end("train", ("call in C", "Python", "defect"))
    assert [one.code for one in ended] == [1, 1, 1]
    assert ended[0].output == (
        "voxtral-dist: error: Rank 2 on a ended with an unexpected error, KeyError: 'key' (the traceback is in that "
        "rank's output)\n"
    )
    assert ended[1].output == ""
    assert ended[2].output.startswith("Traceback")
    assert ended[2].output.endswith("KeyError: 'key'\n")


def test_a_gpu_without_memory_is_named_on_other_nodes(end):
    ended = end("train", ("call in C", "no memory", "collective"), ("a", "a", "b"))
    sentence = "voxtral-dist: error: Rank 1 ran out of GPU memory (CUDA out of memory. Tried to allocate 2.00 GiB): "
    assert [one.code for one in ended] == [3, 3, 3]
    assert ended[0].output == "", "rank 1 prints it on this node"
    assert ended[1].output.startswith(sentence)
    assert ended[2].output.startswith(sentence)
    assert ended[2].output.endswith(" (rank 1 on a)\n")


def test_a_data_worker_that_is_killed_is_one_sentence(end):
    ended = end("train", ("collective", "killed data worker", "call in C"))
    assert [(one.code, one.output.count("\n")) for one in ended] == [(76, 0), (76, 1), (76, 0)]
    assert ended[1].output.startswith(
        "voxtral-dist: error: A data worker of rank 1 on a is gone (DataLoader worker (pid"
    )
    assert "Lower `train_data.num_workers`" in ended[1].output


def _is_running(process: str) -> bool:
    """Whether a process has not ended; of one that has, perhaps nobody has asked how."""
    try:
        return "State:\tZ" not in Path("/proc", process, "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_data_workers_end_with_their_ranks(end, tmp_path):
    ended = end("train", ("data worker", "collective", "Ctrl-C beside a data worker"))
    assert [one.code for one in ended] == [130, 130, 130]
    workers = list((tmp_path / "workers").iterdir())
    assert len(workers) == 2
    # Killed, but a busy machine may not have ended them yet.
    deadline = time.monotonic() + LIMIT_SECONDS
    while any(_is_running(worker.name) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_ranks_that_meet_the_same_mistake_print_it_once(end):
    ended = end("train", ("mistake", "mistake", "mistake"))
    assert ended == [Ended(2, f"voxtral-dist: error: {MISTAKE}\n"), Ended(2, ""), Ended(2, "")]


@pytest.mark.parametrize(
    ("actions", "code"),
    [
        (("finish", "finish later", "finish later"), 0),
        (("finish later", "finish", "finish"), 0),
        (("stop", "stop later", "stop"), EXIT_STOPPED),
    ],
)
def test_ranks_that_finish_or_stop_at_different_times_are_no_failure(end, actions, code):
    assert end("train", actions) == 3 * [Ended(code, "")]


@pytest.mark.parametrize(
    ("command", "actions", "sentence"),
    [
        ("refused", (), "nowhere.yaml"),
        ("train", ("mistake", "mistake", "mistake"), MISTAKE),
        ("transcribe", ("finish", "broken recording", "finish"), "1 of 2 recordings could not be transcribed"),
    ],
    ids=["before ranks meet", "while they run", "after they have parted"],
)
def test_no_rank_ends_before_the_first_one_has_printed_for_all(end, command, actions, sentence):
    first, *others = end(command, actions, printing=(2.0, 8.0))
    assert first.code == 2
    assert first.output.startswith("voxtral-dist: error: ")
    assert sentence in first.output
    assert first.output.count("\n") == 1
    assert others == 2 * [Ended(2, "")]


def test_no_rank_that_stops_ends_before_the_first_one_has_said_so(end):
    ended = end("train", ("stop later, and say so", "stop", "stop"))
    assert ended == [Ended(EXIT_STOPPED, "Stopped.\n"), Ended(EXIT_STOPPED, ""), Ended(EXIT_STOPPED, "")]


def test_ranks_print_what_the_first_one_cannot_print_in_time(end):
    ended = end("train", ("mistake", "mistake", "mistake"), printing=(4.0, 1.0))
    assert f"voxtral-dist: error: {MISTAKE}\n" in {one.output for one in ended}


def _start(command: list[str], config: Path, **variables: str) -> subprocess.Popen[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return start_program([*command, "--config", str(config)], {"PATH": path, **variables})


def _seconds_since_failure(output: str) -> float:
    failed = re.search(r"^failed at (.*)$", output, re.MULTILINE)
    assert failed is not None, output
    return time.time() - float(failed[1])


RANKS = str(Path(__file__).with_name("failing_ranks.py"))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return config_of(tmp_path)


# Without a watch, DeepSpeed's launcher waits 30 s for each rank before it kills it, and another node for 30 minutes.


@pytest.mark.slow
def test_the_launcher_of_deepspeed_need_not_kill_ranks(config):
    run = _start(["deepspeed", "--num_accelerators=4", f"--master_port={free_port()}", RANKS], config)
    output = finish(run)
    assert run.returncode == 3
    assert output.count("voxtral-dist: error: Rank 3 cannot read the shard.\n") == 1
    assert _seconds_since_failure(output) < 30


def test_torchrun_need_not_kill_ranks(config):
    run = _start(["torchrun", "--standalone", "--nproc-per-node=2", RANKS], config)
    output = finish(run)
    assert run.returncode == 1
    assert output.count("voxtral-dist: error: Rank 1 cannot read the shard.\n") == 1
    assert _seconds_since_failure(output) < 30


def test_a_failure_ends_other_nodes(config):
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NUM_NODES": "2", "PROCS_PER_NODE": "1"}
    variables["VOXTRAL_TRAIN_SCRIPT"] = RANKS
    first, second = [
        _start(
            [str(ROOT / "docker" / "entrypoint")], config, NODE_RANK=str(rank), HOST_NAME=f"node-{rank}", **variables
        )
        for rank in range(2)
    ]
    try:
        outputs = [finish(first), finish(second)]
    finally:
        kill_all(first)
        kill_all(second)
    assert [first.returncode, second.returncode] == [3, 3]
    assert outputs[0].count("voxtral-dist: error: Rank 1 cannot read the shard. (rank 1 on node-1)\n") == 1
    assert outputs[1].count("voxtral-dist: error: Rank 1 cannot read the shard.\n") == 1
    assert _seconds_since_failure(outputs[1]) < 30


def _leave_before_a_collective_has_ended(rank: int) -> NoReturn:
    with joined_world():
        dist.all_reduce(torch.ones(1))
        if rank == 0:
            time.sleep(1.0)
        total = torch.ones(1)
        work = dist.all_reduce(total, async_op=True)
        if rank == 0:
            work.wait()
            print(float(total), end="")
    os._exit(0)


def test_no_rank_leaves_a_collective_that_others_still_take_part_in(end):
    ended = run_programs(2, _leave_before_a_collective_has_ended, limit_seconds=LIMIT_SECONDS)
    assert ended == [Ended(0, "2.0"), Ended(0, "")]


def _join_twice(rank: int) -> NoReturn:
    for _ in range(2):
        with joined_world():
            dist.all_reduce(torch.ones(1))
    os._exit(0)


def test_ranks_join_one_world_after_the_other(end):
    assert run_programs(3, _join_twice, limit_seconds=LIMIT_SECONDS) == 3 * [Ended(0, "")]
