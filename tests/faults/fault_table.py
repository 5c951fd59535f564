"""The table of faults: `fault_table.py ROWS.json PAGE.md` prints it, and puts it into the page."""

from __future__ import annotations

import fcntl
import itertools
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from injection import FAULTS

ENGINES = {"2": "ZeRO-2", "3": "ZeRO-3", "fsdp2": "FSDP2"}
PHASES = ("stepping", "saving", "evaluating", "exporting")
DAMAGED = "newest checkpoint damaged: "
DAMAGES = ("size", "content", "header", "manifest")
# Before the first step.
STARTING = "starting"
_ALL_PHASES = ", ".join(PHASES)
# Phases that a fault has no part in, and why.
IMPOSSIBLE = {
    ("object store stalls", "exporting"): "an export writes to `run_dir` only",
    (f"{DAMAGED}any", _ALL_PHASES): "a checkpoint is read by the next start, and a selected one before the export",
    ("error of a GPU", _ALL_PHASES): "needs a GPU",
    ("kernel that does not end", _ALL_PHASES): "needs a GPU",
}
# Places in the code, files of checkpoints, and numbers.
_VARYING = re.compile(r"in \S+ \(\S+:\d+\)|[\w-]+\.(?:safetensors|distcp)|\.metadata|\([^()]*\)|\d[\d.]*")
_HEAD = """\
| fault | while | detected, ended after (s) | steps lost | curve equal | what the user saw | exit code |
|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """What happened after a fault under one engine.

    Attributes:
        detected: seconds until the first rank ended with an error; None where no rank did.
        ended: seconds until all ranks had ended.
        steps_lost: steps that were done before and are done again.
        is_equal: whether all losses of the resumed run are those of the unbroken one.
        said: the first line that tells the user; empty if none does.
        code: the exit code.
    """

    detected: float | None
    ended: float | None
    steps_lost: int
    is_equal: bool
    said: str
    code: int


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes from the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def store(path: Path, key: tuple[str, ...], value: Any) -> None:
    """Add a value to a file of rows, which several processes may do at the same time."""
    with locked(path):
        rows = read(path) | {json.dumps(key): value}
        path.with_suffix(".tmp").write_text(json.dumps(rows, indent=1))
        path.with_suffix(".tmp").rename(path)


def store_row(path: Path, fault: str, phase: str, engine: str, row: Row) -> None:
    """Add a row to a file of rows."""
    store(path, (fault, phase, engine), asdict(row))


def read(path: Path) -> dict[str, Any]:
    """All values of a file of rows."""
    rows: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return rows


def render(rows: dict[str, Any]) -> str:
    """The table in Markdown: one line for each fault and phase, with what engines have in common said once."""
    cells: dict[tuple[str, str], dict[str, Row]] = {}
    for key, value in rows.items():
        fault, phase, engine = json.loads(key)
        cells.setdefault((fault, phase), {})[engine] = Row(**value)
    lines = {(fault, phase): _line(fault, phase, of) for (fault, phase), of in cells.items()}
    lines |= {
        (fault, phase): f"| {fault} | {phase} | - | - | - | - ({why}) | - |\n"
        for (fault, phase), why in IMPOSSIBLE.items()
    }
    return _HEAD + "".join(lines[key] for key in sorted(lines, key=_place))


def _place(key: tuple[str, str]) -> tuple[int, int]:
    """The place of a line: faults and phases in the order in which they are listed."""
    fault, phase = key
    listed = [*FAULTS, *(fault for fault, _ in IMPOSSIBLE), *(f"{DAMAGED}{damage}" for damage in DAMAGES)]
    return listed.index(fault), PHASES.index(phase) if phase in PHASES else -1


def _line(fault: str, phase: str, of: dict[str, Row]) -> str:
    rows = [of[engine] for engine in ENGINES if engine in of]
    columns = [
        _common([_seconds(row) for row in rows]),
        _common([str(row.steps_lost) for row in rows]),
        _common(["yes" if row.is_equal else "**no**" for row in rows]),
        _said({engine: _escaped(of[engine].said) or "nothing" for engine in ENGINES if engine in of}),
        _common([str(row.code) for row in rows]),
    ]
    which = "" if len(of) == len(ENGINES) else f" ({', '.join(ENGINES[engine] for engine in ENGINES if engine in of)})"
    return f"| {fault} | {phase}{which} | {' | '.join(columns)} |\n"


def _common(values: list[str]) -> str:
    return values[0] if len(set(values)) == 1 else " / ".join(values)


def _said(of: dict[str, str]) -> str:
    """The sentences of all engines, those once that differ in numbers and places only."""
    alike: dict[str, list[str]] = {}
    for engine, sentence in of.items():
        alike.setdefault(_VARYING.sub("", sentence), []).append(engine)
    if len(alike) == 1:
        return next(iter(of.values()))
    return " / ".join(
        f"{', '.join(ENGINES[engine] for engine in engines)}: {of[engines[0]]}" for engines in alike.values()
    )


def _seconds(row: Row) -> str:
    detected = "-" if row.detected is None else f"{row.detected:.1f}"
    return detected if row.ended is None else f"{detected}, {row.ended:.1f}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def put_into_page(page: Path, name: str, table: str) -> None:
    """Put a table between the marks of its name on a page."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")


def missing(rows: dict[str, Any]) -> list[str]:
    """What has not been run."""
    places = [place for place in itertools.product(FAULTS, PHASES) if place not in IMPOSSIBLE]
    places += [("SIGTERM", STARTING), *((f"{DAMAGED}{damage}", STARTING) for damage in DAMAGES)]
    return [
        f"{fault}, {phase}, {ENGINES[engine]}"
        for (fault, phase), engine in itertools.product(places, ENGINES)
        if json.dumps([fault, phase, engine]) not in rows
    ]


def main(path: Path, page: Path) -> None:
    """Print the table, and put it into the page if it is whole."""
    rows = read(path)
    table = render(rows)
    print(table)
    if missing(rows):
        sys.exit(f"{page} is as it was, because these have not been run: {'; '.join(missing(rows))}")
    put_into_page(page, "faults", table)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
