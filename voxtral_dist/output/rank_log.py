"""What each rank prints, in a file of its own: the terminal shows what rank 0 prints, and the errors of all others."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from voxtral_dist.output.console import copy_to

_STREAMS = (1, 2)


@dataclass
class _Open:
    """An open log, and copies of the descriptors that it has taken."""

    file: TextIO
    kept: dict[int, int]


_log: _Open | None = None


def open_rank_log(folder: Path, rank: int, size: int) -> None:
    """Write what this process prints from now on to `rank-RRRRR.txt` in a folder, behind what earlier processes wrote.

    Rank 0 goes on printing, and what it says is copied. Of other ranks everything goes to the file, also what
    libraries print in C; their errors are printed too, behind `[rank R]`. A process without others has no file, and
    one whose file cannot be opened prints everything.
    """
    global _log
    if size == 1 or _log is not None:
        return
    with suppress(OSError):
        folder.mkdir(exist_ok=True)
        file = (folder / f"rank-{rank:05d}.txt").open("a", encoding="utf-8", errors="backslashreplace")
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        place = f"rank {rank} of {size} on {socket.gethostname()}, process {os.getpid()}, restart {attempt}, {now}"
        file.write(f"\n--- {place}\n")
        file.flush()
        _log = _Open(file, {})
        if rank == 0:
            copy_to(lambda text, _is_error: _write(file, text))
        else:
            _redirect(_log, rank)


def _redirect(log: _Open, rank: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    log.kept = {number: os.dup(number) for number in _STREAMS}
    for number in _STREAMS:
        os.dup2(log.file.fileno(), number)
    terminal = os.fdopen(os.dup(log.kept[2]), "w", encoding="utf-8", errors="backslashreplace")
    copy_to(lambda text, is_error: _write(terminal, f"[rank {rank}] {text}") if is_error else None, first=True)


def _write(file: TextIO, text: str) -> None:
    # A full disk, or a reader that has gone.
    with suppress(OSError, ValueError):
        file.write(text)
        file.flush()


@contextmanager
def rank_log_closed() -> Iterator[None]:
    """Close the log that was opened in the context. After an error it stays open: the process says why, and ends."""
    global _log
    yield
    if _log is not None:
        copy_to(None)
        sys.stdout.flush()
        sys.stderr.flush()
        for number, kept in _log.kept.items():
            os.dup2(kept, number)
            os.close(kept)
        _log.file.close()
        _log = None
