"""What a launcher or scheduler tells a process about its place, and the launcher's life."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

from voxtral_dist.errors import UserError

# https://docs.open-mpi.org/en/v5.0.x/tuning-apps/environment-var.html
_OPEN_MPI = {
    "RANK": "OMPI_COMM_WORLD_RANK",
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
    "LOCAL_WORLD_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE",
}
# Processes or nodes that a scheduler has started; `docker/entrypoint` names the sources.
_COUNTS = ("SLURM_STEP_NUM_TASKS", "PMI_SIZE", "PET_NNODES", "SKYPILOT_NUM_NODES", "DSTACK_NODES_NUM")
_POLL_SECONDS = 1.0
_is_watching = False


def adopt_launched_place() -> None:
    """Set `RANK`, `WORLD_SIZE` and so on from Open MPI's variables, where the launcher has not set them.

    Raises:
        UserError: a scheduler has started several processes, but not as ranks: each would work alone.
    """
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return
    if _is_several("OMPI_COMM_WORLD_SIZE"):
        place = {name: os.environ[theirs] for name, theirs in _OPEN_MPI.items() if theirs in os.environ}
        if place["WORLD_SIZE"] != place.get("LOCAL_WORLD_SIZE") and "MASTER_ADDR" not in os.environ:
            raise UserError(
                "MASTER_ADDR must name the host of rank 0, because Open MPI has started ranks on several hosts, but is "
                "missing: add `-x MASTER_ADDR=HOST` to mpirun."
            )
        os.environ.update(place)
        return
    for name in _COUNTS:
        if _is_several(name):
            raise UserError(
                f"{name} is {os.environ[name]!r}, but this process has no RANK and WORLD_SIZE, so each of those would "
                "work alone: start one process per node by docker/entrypoint, or set WORLD_SIZE=1 if each is to work "
                "alone."
            )


def is_on_several_hosts() -> bool:
    """Whether other hosts have ranks too, as far as the launcher says.

    A mistake that one host meets alone is then left to checks after the ranks have met, which end all of them: without
    this rank, the others would wait for it until `distributed.start_timeout_seconds`.
    """
    size = os.environ.get("WORLD_SIZE") or os.environ.get(_OPEN_MPI["WORLD_SIZE"])
    on_this_host = (os.environ.get(name) for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", _OPEN_MPI["LOCAL_WORLD_SIZE"]))
    return next(filter(None, on_this_host), size) != size


def _is_several(name: str) -> bool:
    return os.environ.get(name, "1").lstrip("0") not in ("", "1")


def watch_launcher() -> None:
    """Send this process SIGTERM once its launcher is gone, because nobody else would end it.

    The command `deepspeed` starts a launcher of its own, which a SIGTERM to the command leaves behind: then both are
    watched. A process that no launcher has started is not watched. Of several calls the first one counts.
    """
    global _is_watching
    if "RANK" in os.environ and not _is_watching:
        _is_watching = True
        watched = _launcher_processes(os.getppid())
        threading.Thread(target=_end_with, args=(watched,), name="launcher-watch", daemon=True).start()


def _launcher_processes(parent: int) -> list[tuple[int, int]]:
    """Processes with their parents as they are now: this one, and DeepSpeed's launcher below its command."""
    pairs = [(os.getpid(), parent)]
    grandparent = _parent(parent)
    if grandparent is not None and b"deepspeed.launcher.launch" in _command(parent):
        words = [Path(os.fsdecode(word)).name for word in _command(grandparent).split(b"\0")[:3]]
        if {"deepspeed", "entrypoint"} & set(words):
            pairs.append((parent, grandparent))
    return pairs


def _end_with(watched: list[tuple[int, int]]) -> None:
    while all(_parent(process) == parent for process, parent in watched):
        time.sleep(_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def _parent(process: int) -> int | None:
    """The parent of a process; None if it has ended, or where there is no /proc."""
    if process == os.getpid():
        return os.getppid()
    try:
        # The second field is a name in parentheses, which may hold spaces.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return int(fields[1])
    except (OSError, IndexError, ValueError):
        return None


def _command(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""
