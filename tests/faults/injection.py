"""Faults that a rank of a real run meets at a named place: `faulty_program` stands for `launch/train.py`.

The faults of processes are those of NVIDIA's resiliency extension (`inject_fault`); the product knows of none of this.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

# The fault of a phase comes in the middle of this step, or while the checkpoint of that step is written.
FAULTY_STEP = 4
FAULTY_SAVE = 6

SENTENCE = "an injected defect"
_FILLER = ".filler"
_FOREVER = 10**6


class InjectedError(Exception):
    """Stands for a defect."""


@dataclass(frozen=True)
class Injection:
    """A fault, where it comes, and the file that says when it came.

    run_dir: of the run.
    """

    fault: str
    phase: str
    run_dir: Path
    marker: Path

    def came(self) -> tuple[float, int]:
        """When the fault came, in seconds since the epoch, and after which step.

        Raises:
            OSError: it did not.
        """
        seconds, step = json.loads(self.marker.read_text())
        return seconds, step


def faulty_program(rank: int, arguments: list[str], port: int, injection: Injection | None) -> None:
    """Run a command of `voxtral-dist` as a rank that meets a fault."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if injection is not None:
        if injection.fault == "host lost":
            # Each rank is a node of its own.
            os.environ |= {"LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
        fault = _FAULTS[injection.fault]
        if rank == fault.rank:
            signal.signal(signal.SIGUSR2, _raise)
            PHASES[injection.phase](_once(fault, injection))
    from voxtral_dist.cli.main import console

    console(arguments)


def undo(injection: Injection) -> None:
    """Repair what a fault has left, as a user would."""
    match injection.fault:
        case "disk full":
            (injection.run_dir / _FILLER).unlink()
        case "read-only disk":
            subprocess.run(["umount", str(injection.run_dir)], check=True)


def _once(fault: _Fault, injection: Injection) -> Callable[[], None]:
    """What makes the fault come the first time that it is called."""
    lock = threading.Lock()

    def fire() -> None:
        if lock.acquire(blocking=False):
            temporary = injection.marker.with_suffix(".tmp")
            temporary.write_text(json.dumps([time.time(), _last_step(injection.run_dir)]))
            temporary.rename(injection.marker)
            fault.make(injection.run_dir)

    return fire


def _last_step(run_dir: Path) -> int:
    from voxtral_dist.training.metrics_file import read_metrics

    rows = read_metrics(run_dir / "metrics.jsonl")
    return max((row["step"] for row in rows if row["kind"] == "train"), default=0)


# What follows patches the run in a rank's own process.


def _starting(fire: Callable[[], None]) -> None:
    from voxtral_dist import train

    build = train.build_engine

    def faulty(*arguments: Any) -> Any:
        fire()
        return build(*arguments)

    train.build_engine = faulty


def _stepping(fire: Callable[[], None]) -> None:
    """Where the other rank waits for this one's gradients."""
    from voxtral_dist.training.step import TrainStep

    run = TrainStep.run

    def faulty(self: Any, batches: Any, *arguments: Any) -> Any:
        if batches.step + 1 == FAULTY_STEP:
            backward = self.engine.backward

            def faulty_backward(*inputs: Any, **options: Any) -> Any:
                fire()
                return backward(*inputs, **options)

            self.engine.backward = faulty_backward
        return run(self, batches, *arguments)

    TrainStep.run = faulty  # type: ignore[method-assign]


def _saving(fire: Callable[[], None]) -> None:
    """In the thread that writes while steps go on, when this rank's tensors are written and not flushed."""
    from voxtral_dist.checkpoints import files

    on_disk = files._on_disk

    def faulty(path: Path) -> Any:
        if path.parent.name == f".step-{FAULTY_SAVE:07d}.tmp":
            fire()
        return on_disk(path)

    files._on_disk = faulty


def _evaluating(fire: Callable[[], None]) -> None:
    from voxtral_dist.evaluation import decoding

    def faulty(decode: Callable[..., Any]) -> Callable[..., Any]:
        def decode_faultily(self: Any, *arguments: Any) -> Any:
            fire()
            return decode(self, *arguments)

        return decode_faultily

    for name in ("_decode_from_queue", "_decode_in_lockstep"):
        setattr(decoding._RankDecoder, name, faulty(getattr(decoding._RankDecoder, name)))


def _exporting(fire: Callable[[], None]) -> None:
    from voxtral_dist import train

    export = train.export_trained

    def faulty(engine: Any, *arguments: Any) -> None:
        weights = engine.weights

        def faulty_weights() -> Iterator[Any]:
            for number, weight in enumerate(weights()):
                if number == 5:
                    fire()
                yield weight
            # A rank that has no part in it.
            fire()

        engine.weights = faulty_weights
        export(engine, *arguments)

    train.export_trained = faulty


PHASES: dict[str, Callable[[Callable[[], None]], None]] = {
    "starting": _starting,
    "stepping": _stepping,
    "saving": _saving,
    "evaluating": _evaluating,
    "exporting": _exporting,
}


def _raise(*_: Any) -> NoReturn:
    raise InjectedError(SENTENCE)


def _raise_elsewhere() -> None:
    """Raise in the main thread, whatever it does."""
    main = ctypes.c_ulong(threading.main_thread().ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(InjectedError))


def _send(number: signal.Signals) -> Callable[[Path], None]:
    return lambda _: os.kill(os.getpid(), number)


def _interrupt_all() -> None:
    """Ctrl-C reaches all processes of a terminal."""
    children = Path(f"/proc/{os.getppid()}/task/{os.getppid()}/children").read_text().split()
    for process in sorted(map(int, children), key=lambda one: one == os.getpid()):
        os.kill(process, signal.SIGINT)


def _terminate_twice() -> None:
    threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGTERM]).start()
    os.kill(os.getpid(), signal.SIGTERM)


def _fill(run_dir: Path) -> None:
    with (run_dir / _FILLER).open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def _remove(run_dir: Path) -> None:
    # Another rank may be writing there.
    while run_dir.exists():
        shutil.rmtree(run_dir, ignore_errors=True)


def _make_read_only(run_dir: Path) -> None:
    """Files that are open stay writable; a remount of the disk would need that there are none."""
    subprocess.run(["mount", "--bind", str(run_dir), str(run_dir)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(run_dir)], check=True)


@dataclass(frozen=True)
class _Fault:
    """What happens, given `run_dir`, and on which of two ranks."""

    make: Callable[[Path], Any]
    rank: int = 1


_FAULTS: dict[str, _Fault] = {
    "exception": _Fault(_raise),
    "exception from another thread": _Fault(lambda _: _raise_elsewhere()),
    "exception in a signal handler": _Fault(_send(signal.SIGUSR2)),
    "abort": _Fault(lambda _: os.abort()),
    "segmentation fault": _Fault(lambda _: ctypes.string_at(0)),
    "SIGINT": _Fault(lambda _: _interrupt_all()),
    "SIGKILL": _Fault(_send(signal.SIGKILL)),
    "SIGTERM": _Fault(_send(signal.SIGTERM)),
    "two SIGTERMs": _Fault(lambda _: _terminate_twice()),
    "SIGSTOP": _Fault(_send(signal.SIGSTOP)),
    "a rank sleeps": _Fault(lambda _: time.sleep(_FOREVER)),
    "the interpreter's lock is held": _Fault(lambda _: ctypes.PyDLL(None).sleep(_FOREVER)),
    "host lost": _Fault(_send(signal.SIGSTOP)),
    "disk full": _Fault(_fill, rank=0),
    "read-only disk": _Fault(_make_read_only, rank=0),
    "`run_dir` removed": _Fault(_remove, rank=0),
    # The servers do it.
    "object store stalls": _Fault(lambda _: None, rank=0),
}
FAULTS = tuple(_FAULTS)
