"""The file `metrics.jsonl` of a run: one row for each update, evaluation, checkpoint and event."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from voxtral_dist.files import write_atomically


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete rows of a file, none where it does not exist. A last line that a kill cut off is skipped."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def drop_rows_after(path: Path, step: int) -> None:
    """Drop the rows after the checkpoint that a run resumes from, so that each step has one row.

    At step 0, without a checkpoint, all rows are dropped: they may belong to another model or to other test sets.
    """
    rows = [row for row in read_metrics(path) if row["step"] <= step] if step else []
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
