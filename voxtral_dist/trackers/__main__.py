"""The program of a follower: `python -m voxtral_dist.trackers KIND RUN_DIR`, which ends with its standard input."""

from __future__ import annotations

import logging
import os
import select
import sys
import threading
from pathlib import Path
from typing import cast

from voxtral_dist.config import TrackerKind
from voxtral_dist.output.console import printable
from voxtral_dist.trackers.following import Follower
from voxtral_dist.trackers.tracker import FOLDER

# Of a follower whose run was killed: its services may be gone for good.
_ORPHAN_SECONDS = 600.0


def main(kind: str, run_dir: Path) -> int:
    """Follow a run. Returns 0 if everything was sent."""
    (run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
    # What services print goes to a file.
    terminal = os.dup(2)
    with (run_dir / FOLDER / f"{kind}.log").open("a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")

    def say(line: str) -> None:
        os.write(terminal, f"{printable(line)}\n".encode())

    def wait(seconds: float) -> bool:
        if not select.select([0], [], [], seconds)[0]:
            return False
        if not os.read(0, 1):
            _limit()
        return True

    return 0 if Follower(run_dir, cast("TrackerKind", kind), say).follow(wait) else 1


def _limit() -> None:
    """End in some minutes: the run was killed, and nobody else ends this process."""
    timer = threading.Timer(_ORPHAN_SECONDS, os._exit, [1])
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    code = main(sys.argv[1], Path(sys.argv[2]))
    sys.stderr.flush()
    sys.exit(code)
