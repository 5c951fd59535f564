"""The file `metrics.jsonl` of a run: one row for each update, evaluation, checkpoint and event."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from voxtral_dist.files import write_atomically
from voxtral_dist.text.json_text import parse_json

# Beside `metrics.jsonl`.
DAMAGED_FILE = "metrics.damaged.jsonl"
# Values that are read back; those that were not measured are null or missing.
_NUMBERS = ("wer", "seconds", "step_seconds", "waiting_seconds", "memory_gigabytes", "model_flops_utilization")
_NEEDED = {
    "evaluation": ("name", "wer"),
    "train": ("step_seconds", "memory_gigabytes", "model_flops_utilization"),
}


@dataclass(frozen=True)
class Metrics:
    """The rows of a file, and the lines that are none, by number from 1."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    damaged: dict[int, bytes] = field(default_factory=dict)


def split_metrics(path: Path) -> Metrics:
    """The rows and the damaged lines of a file; none where it does not exist.

    A last line without an end does not count: a kill cut it off.

    Raises:
        OSError: the file cannot be read.
    """
    metrics = Metrics()
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    for number, line in enumerate(lines, 1):
        row = parse_row(line)
        if row is None:
            metrics.damaged[number] = line
        else:
            metrics.rows.append(row)
    return metrics


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, none where it does not exist. Damaged lines are skipped."""
    return split_metrics(path).rows


def drop_rows_after(path: Path, step: int) -> Metrics:
    """Drop the rows after the checkpoint that a run resumes from, so that each step has one row.

    At step 0, without a checkpoint, all rows are dropped: they may belong to another model or to other test sets.
    Otherwise damaged lines are appended to `DAMAGED_FILE`.

    Returns:
        The rows that are left, and the damaged lines that were set aside.
    """
    metrics = split_metrics(path) if step else Metrics()
    if metrics.damaged:
        with path.with_name(DAMAGED_FILE).open("ab") as file:
            file.writelines(line + b"\n" for line in metrics.damaged.values())
    kept = Metrics([row for row in metrics.rows if row["step"] <= step], metrics.damaged)
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept.rows))
    return kept


def scalars_of(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row of kind `train` or `evaluation`, by names such as `evaluation/dev/wer`; others have none."""
    if row["kind"] not in ("train", "evaluation"):
        return {}
    prefix = f"{row['kind']}/{row['name']}" if "name" in row else row["kind"]
    return {f"{prefix}/{key}": value for key, value in row.items() if key != "step" and isinstance(value, int | float)}


def parse_row(line: bytes) -> dict[str, Any] | None:
    """The row in a line; None if it is damaged."""
    try:
        row = parse_json(line)
        # A lone surrogate could not be written again.
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except ValueError:
        return None
    return row if _is_row(row) else None


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or type(row.get("step")) is not int or not isinstance(row.get("kind"), str):
        return False
    needed = _NEEDED.get(row["kind"], ())
    if row["kind"] == "train" and "waiting_seconds" not in row:
        needed = ()
    if not all(name in row for name in needed) or not isinstance(row.get("name", ""), str):
        return False
    return all(isinstance(row.get(name), float | int | None) for name in _NUMBERS)
