"""Real ranks for tests: processes that communicate by gloo and meet through a file, so that no port can be taken.

They are forked from a process that has imported the libraries, which would take each rank ten seconds. That process has
no threads, because a fork would lose them.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

_TIMEOUT_SECONDS = 480
_PRELOADED = (
    "deepspeed",
    "voxtral_dist.engine.zero.engine",
    "voxtral_dist.engine.fsdp2.engine",
    "voxtral_dist.train",
    # What these import late. The first decorates by `torch.compile`, which imports all of TorchInductor.
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "torch.utils.tensorboard",
    "transformers.models.voxtral.modeling_voxtral",
    "transformers.models.llama.modeling_llama",
    "voxtral_dist.cli.main",
    "voxtral_dist.engine.fsdp2.dcp_writing",
    # What test modules import.
    "pytest",
)
_server: tuple[Any, Connection] | None = None


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(world, *arguments)` returns on each rank.

    `function` must be importable: defined at the top of a test module. A rank that raises fails the test with its
    traceback, and ends the others.
    """
    with tempfile.TemporaryDirectory() as folder:
        exit_codes = _fork(_run_rank, _exit_codes, world_size, folder, function, arguments)
        failures = sorted(Path(folder).glob("failure-*"), key=lambda path: path.stat().st_mtime)
        assert not failures, failures[0].read_text()
        results = [Path(folder) / f"result-{rank}" for rank in range(world_size)]
        assert all(path.is_file() for path in results), f"ranks ended with exit codes {exit_codes} and no result"
        return [pickle.loads(path.read_bytes()) for path in results]


@dataclass(frozen=True)
class Ended:
    """The end of a process.

    Attributes:
        code: its exit code; -9 if it had to be killed because it did not end.
        output: what it had printed when the first process ended with an error, because launchers end the others then.
    """

    code: int
    output: str


def run_programs(world_size: int, function: Callable[..., Any], *arguments: Any, limit_seconds: float) -> list[Ended]:
    """Run `function(rank, *arguments)` as a program of its own on each rank, as a launcher would start it.

    The ranks find `RANK` and so on in their environment. None is ended because another one has.
    """
    with tempfile.TemporaryDirectory() as folder:
        watch = partial(_exit_codes, limit_seconds=limit_seconds)
        codes = _fork(_run_program, watch, world_size, folder, function, arguments)
        outputs = [(Path(folder) / f"printed-{rank}").read_text() for rank in range(world_size)]
        return [Ended(code, output) for code, output in zip(codes, outputs, strict=True)]


@dataclass(frozen=True)
class Kill:
    """SIGKILL of a rank at some moment.

    Attributes:
        seconds: after the start, or after a file has appeared.
        rank: None: all ranks at once, like a node that loses power.
        after: this file.
    """

    seconds: float
    rank: int | None = None
    after: Path | None = None

    def has_begun(self) -> bool:
        return self.after is None or self.after.exists()


@dataclass(frozen=True)
class EndedJob:
    """The end of all ranks of a program under a launcher.

    Attributes:
        code: as of the command `deepspeed`: of the rank that ended first with an error, 256 minus the number of a
            signal; None if the job had to be killed because it did not end.
        output: all that was printed, that of rank 0 first.
        first_end, last_end: when the first rank ended with an error, and when all had ended (seconds since the epoch).
    """

    code: int | None
    output: str
    first_end: float
    last_end: float


def run_job(
    world_size: int,
    function: Callable[..., Any],
    *arguments: Any,
    limit_seconds: float,
    grace_seconds: float = 30.0,
    lost_rank: int | None = None,
    kill: Kill | None = None,
) -> EndedJob:
    """Run `function(rank, *arguments)` as a program of its own on each rank, and do what launchers do.

    As soon as a rank has ended with an error, the others get SIGTERM, and SIGKILL some seconds later.

    Args:
        world_size: number of ranks.
        function: importable.
        arguments: of the function.
        limit_seconds: when what is still running is killed.
        grace_seconds: between SIGTERM and SIGKILL.
        lost_rank: a rank on a node of its own that is lost: nobody ends it, and nobody waits for it.
        kill: ends it before.
    """
    with tempfile.TemporaryDirectory() as folder:
        watch = partial(
            _launch, limit_seconds=limit_seconds, grace_seconds=grace_seconds, lost_rank=lost_rank, kill=kill
        )
        code, first_end, last_end = _fork(_run_program, watch, world_size, folder, function, arguments)
        outputs = [Path(folder) / f"output-{rank}" for rank in range(world_size)]
        output = "".join(path.read_text(errors="replace") for path in outputs if path.exists())
        return EndedJob(code, output, first_end, last_end)


def start_program(folder: Path, function: Callable[..., Any], *arguments: Any) -> int:
    """Run `function(0, *arguments)` as a program of its own that prints to `folder/output-0`; return its process id."""
    process_id: int = _fork(_run_program, _remember, 1, str(folder), function, arguments)
    return process_id


def end_of_program(process_id: int) -> int | None:
    """The exit code of a program that was started, which is negative after a signal; None while it runs."""
    code: int | None = _fork(_run_program, partial(_code_of, process_id), 0, "", None, ())
    return code


def _fork(
    run: Callable[[int, int, Path, bytes], None],
    watch: Callable[[Sequence[Any], Path], Any],
    world_size: int,
    folder: str,
    function: Callable[..., Any] | None,
    arguments: Any,
) -> Any:
    connection = _connection()
    call = pickle.dumps((function, arguments))
    connection.send((run, watch, world_size, folder, call, sys.path, dict(os.environ), str(Path.cwd())))
    return connection.recv()


def _connection() -> Connection:
    """The connection to the process that forks ranks, which ends with this process."""
    global _server
    if _server is None:
        mine, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs,), daemon=False)
        process.start()
        theirs.close()
        # Runs before multiprocessing waits for its children: the server ends when its connection is closed.
        atexit.register(mine.close)
        _server = process, mine
    return _server[1]


def _serve(requests: Connection) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    for name in _PRELOADED:
        importlib.import_module(name)
    # Made at the first use, of a thousand regular expressions.
    get_checkpoint_conversion_mapping("voxtral")
    # Ranks' collections neither visit nor copy what was made here.
    gc.freeze()
    num_threads = len(list(Path("/proc/self/task").iterdir()))
    assert num_threads == 1, f"a fork would lose {num_threads - 1} threads"
    context = multiprocessing.get_context("fork")
    while True:
        try:
            run, watch, world_size, folder, call, sys.path[:], environment, working_folder = requests.recv()
        except EOFError:
            return
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(working_folder)
        ranks = [context.Process(target=run, args=(rank, world_size, Path(folder), call)) for rank in range(world_size)]
        for process in ranks:
            process.start()
        requests.send(watch(ranks, Path(folder)))


def _exit_codes(ranks: Sequence[Any], folder: Path, limit_seconds: float | None = None) -> list[int | None]:
    """Wait for all ranks. Without a limit, do so until one fails, because the others may be waiting for it."""
    deadline = time.monotonic() + (limit_seconds or _TIMEOUT_SECONDS)
    running = list(ranks)
    while running and not any(folder.glob("failure-*")) and time.monotonic() < deadline:
        wait([process.sentinel for process in running], timeout=1)
        running = [process for process in running if process.is_alive()]
        if any(process.exitcode for process in ranks):
            if limit_seconds is None:
                break
            _keep_outputs(folder)
    for process in running:
        process.kill()
    for process in ranks:
        process.join()
    if limit_seconds is not None:
        _keep_outputs(folder)
    return [process.exitcode for process in ranks]


def _launch(
    ranks: Sequence[Any],
    _folder: Path,
    limit_seconds: float,
    grace_seconds: float,
    lost_rank: int | None,
    kill: Kill | None,
) -> tuple[int | None, float, float]:
    """Wait for ranks as launchers do; return what `EndedJob` has."""
    started = time.monotonic()
    watched = [process for rank, process in enumerate(ranks) if rank != lost_rank]
    code, first_end, ending = 0, 0.0, started + limit_seconds
    counting: float | None = None
    while True:
        # Before exit codes are read, so that none is missed.
        alive = [process for process in watched if process.is_alive()]
        # Where several have ended meanwhile, one that a signal killed was the first.
        failed = sorted(process.exitcode for process in watched if process.exitcode)
        if failed and not first_end:
            code, first_end = failed[0] % 256, time.time()
            ending = min(ending, time.monotonic() + grace_seconds)
            for process in watched:
                process.terminate()
        if not alive or time.monotonic() >= ending:
            break
        wait([process.sentinel for process in alive], timeout=0.1 if kill is None else 0.02)
        if kill is not None and counting is None and kill.has_begun():
            counting = time.monotonic()
        if kill is not None and counting is not None and time.monotonic() >= counting + kill.seconds:
            for rank, process in enumerate(ranks):
                if kill.rank in (rank, None):
                    process.kill()
            kill = None
    has_ended = first_end or not alive
    last_end = time.time()
    for process in ranks:
        process.kill()
        process.join()
    return code if has_ended else None, first_end or last_end, last_end


# Programs that nobody waits for, in the process that forks.
_programs: dict[int, Any] = {}


def _remember(processes: Sequence[Any], _folder: Path) -> int:
    (process,) = processes
    _programs[process.pid] = process
    return int(process.pid)


def _code_of(process_id: int, _processes: Sequence[Any], _folder: Path) -> int | None:
    code: int | None = _programs[process_id].exitcode
    return code


def _keep_outputs(folder: Path) -> None:
    """Copy what programs have printed so far, unless it was copied before."""
    for output in folder.glob("output-*"):
        kept = folder / output.name.replace("output", "printed")
        if not kept.exists():
            kept.write_bytes(output.read_bytes())


def _run_rank(rank: int, world_size: int, folder: Path, call: bytes) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "DS_ACCELERATOR": "cpu"}
    import torch
    import torch.distributed as dist

    from voxtral_dist.distributed.world import World

    torch.set_num_threads(1)
    try:
        function, arguments = pickle.loads(call)
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(folder / "store"), world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=_TIMEOUT_SECONDS),
        )
        result = function(World(rank, world_size, rank, torch.device("cpu")), *arguments)
        _write(folder / f"result-{rank}", pickle.dumps(result))
        dist.destroy_process_group()
    except BaseException:
        _write(folder / f"failure-{rank}", traceback.format_exc().encode())
        raise


def _run_program(rank: int, world_size: int, folder: Path, call: bytes) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "DS_ACCELERATOR": "cpu"}
    output = os.open(folder / f"output-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import torch

    torch.set_num_threads(1)
    function, arguments = pickle.loads(call)
    function(rank, *arguments)


def _write(path: Path, content: bytes) -> None:
    """Write atomically."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(content)
    temporary.rename(path)
