"""Stands for `launch/train.py`: the rank waits at a named place, where the variables say so, until a file is gone."""

from __future__ import annotations

import os
import runpy
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from injection import PHASES
from runs import ROOT

_PHASE, _FILE = "HELD_PHASE", "HELD_FILE"


def variables_of_hold(phase: str, file: Path) -> dict[str, str]:
    """What makes a rank wait in a phase: it makes the file, and goes on once the file is removed."""
    return {_PHASE: phase, _FILE: str(file)}


def train(variables: Mapping[str, str], arguments: list[str], folder: Path) -> None:
    """Be `launch/train.py` in a process that was forked, in a working folder."""
    os.environ.update(variables)
    os.chdir(folder)
    for entry in reversed(variables.get("PYTHONPATH", "").split(os.pathsep)):
        sys.path.insert(0, entry)
    sys.argv[1:] = arguments
    main()


def main() -> None:
    """Train as the variables and arguments of this process say."""
    if _PHASE in os.environ:
        PHASES[os.environ[_PHASE]](_hold)
    runpy.run_path(str(ROOT / "launch" / "train.py"), run_name="__main__")


_is_first = threading.Lock()


def _hold() -> None:
    file = Path(os.environ[_FILE])
    if _is_first.acquire(blocking=False):
        file.touch()
        while file.exists():
            time.sleep(0.02)


if __name__ == "__main__":
    main()
