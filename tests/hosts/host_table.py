"""The table of several hosts: `host_table.py ROWS.json PAGE.md` prints it, and puts it into the page."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fault_table import put_into_page, read, store

_HEAD = """\
| what was done | engine | what happened | after (s) |
|---|---|---|---|
"""


def store_row(path: Path, situation: str, engine: str, happened: str, seconds: str) -> None:
    """Add a row to a file of rows; of equal situations and engines the newest counts."""
    store(path, (situation, engine), [happened, seconds])


def render(rows: dict[str, Any]) -> str:
    """The table in Markdown."""
    lines = []
    for key, (happened, seconds) in rows.items():
        situation, engine = json.loads(key)
        lines.append(f"| {situation} | {engine} | {happened} | {seconds} |\n")
    return _HEAD + "".join(lines)


def main(rows: Path, page: Path) -> None:
    """Print the table, and put it into the page."""
    table = render(read(rows))
    print(table)
    put_into_page(page, "hosts", table)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
