"""Measurements in forks of one process, which has imported everything and never touches the GPU.

Importing torch, DeepSpeed and transformers takes longer than a measurement. A process that CUDA was started in cannot
be forked usefully, and threads do not survive a fork, so the parent computes nothing: it starts forks one after the
other, watches them, and ends those that take too long or leave the machine without memory.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from workloads.answers import answering_failures, write_answer

LOG_CHARACTERS = 2000
POLL_SECONDS, END_SECONDS = 0.2, 60.0
# With less for some time, a machine without swap may stop answering. A virtual machine may have to be given more first.
LEAST_FREE_HOST_BYTES, PATIENCE_SECONDS = 2 * 10**9, 3.0
# For Linux's choice of a process to kill: a fork, and not the parent.
_FIRST_TO_KILL = "1000"


@dataclass
class Forks:
    """Runs functions in children, one at a time.

    folder: holds a log and an answer of each.
    method: `fork`, or `spawn` where the driver does not survive a fork: then each child imports everything again.
    """

    folder: Path
    method: str = "fork"

    def run(self, name: str, function: Callable[..., dict[str, Any]], *arguments: Any, limit: float) -> dict[str, Any]:
        """What a function returns, or `{"not_run": reason}`; beside it the seconds it took and the memory it added.

        Args:
            name: names the files of the child.
            function: of a module; returns what JSON can hold.
            arguments: for the function.
            limit: seconds after which the child is killed.
        """
        answer, log = self.folder / f"{name}.json", self.folder / f"{name}.log"
        child = get_context(self.method).Process(target=_run, args=(function, arguments, answer, log))
        started, host = time.monotonic(), _HostMemory()
        child.start()
        killed = None
        try:
            while child.is_alive() and killed is None:
                child.join(POLL_SECONDS)
                if host.is_short():
                    killed = f"out of host memory: less than {LEAST_FREE_HOST_BYTES / 1e9:.0f} GB were free"
                elif time.monotonic() - started > limit:
                    killed = f"no answer in {limit:.0f} s"
        finally:
            child.kill()
            # The driver frees a hundred gigabytes slowly.
            child.join(END_SECONDS)
            _kill_group(child.pid)
        result = {"not_run": killed} if killed else _read(answer, child.exitcode)
        if "not_run" in result:
            result["log"] = _end_of(log)
        return result | {"process_seconds": time.monotonic() - started, "added_host_bytes": host.added_bytes}


class _HostMemory:
    """The memory of this machine that a child adds, with what a driver has pinned for it, which no process shows."""

    def __init__(self) -> None:
        self.added_bytes = 0
        self._used_before = _used_and_free()[0]
        self._enough_at = time.monotonic()

    def is_short(self) -> bool:
        """Look at the memory, and return whether hardly any has been free for some time."""
        used, free = _used_and_free()
        self.added_bytes = max(self.added_bytes, used - self._used_before)
        if free > LEAST_FREE_HOST_BYTES:
            self._enough_at = time.monotonic()
        return time.monotonic() - self._enough_at > PATIENCE_SECONDS


def _run(function: Callable[..., dict[str, Any]], arguments: tuple[Any, ...], answer: Path, log: Path) -> None:
    # A group of its own, so that data workers end with it.
    os.setpgid(0, 0)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_KILL, encoding="ascii")
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = sys.stderr = os.fdopen(output, "w", buffering=1, encoding="utf-8", errors="replace")
    try:
        with answering_failures(answer):
            write_answer(answer, function(*arguments))
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    # Libraries' own ends may wait for threads or ranks.
    os._exit(0)


def _read(answer: Path, exit_code: int | None) -> dict[str, Any]:
    if answer.is_file():
        figures: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return figures
    if exit_code is None or exit_code >= 0:
        return {"not_run": f"ended without an answer, with exit code {exit_code}"}
    name = signal.Signals(-exit_code).name
    hint = ", as Linux does where memory runs out" if name == "SIGKILL" else ""
    return {"not_run": f"killed by {name}{hint}"}


def _end_of(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace").strip()[-LOG_CHARACTERS:] if log.is_file() else ""


def _kill_group(group: int | None) -> None:
    """Kill the data workers that a child has left."""
    with suppress(ProcessLookupError):
        if group is not None:
            os.killpg(group, signal.SIGKILL)


def _used_and_free() -> tuple[int, int]:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    sizes = {name: 1024 * int(text.split()[0]) for name, text in (line.split(":", 1) for line in lines)}
    return sizes["MemTotal"] - sizes["MemAvailable"], sizes["MemAvailable"]
