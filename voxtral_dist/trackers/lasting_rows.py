"""Rows of `metrics.jsonl` that stay: those up to the newest checkpoint, from which a killed run would resume."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxtral_dist.training.metrics_file import parse_row


@dataclass(frozen=True)
class LastingRow:
    """A row of kind `train` or `evaluation` with its number among those, from 1."""

    number: int
    row: dict[str, Any]

    @property
    def digest(self) -> str:
        """A fingerprint that tells it from the same step of another attempt, whose durations differ."""
        return hashlib.blake2b(json.dumps(self.row, sort_keys=True).encode(), digest_size=16).hexdigest()


class ReplacedError(Exception):
    """The file is another one: the run was resumed, and has a follower of its own."""


class LastingRows:
    """The rows of a file as it grows, as soon as they last.

    Rows of these two kinds are written in the order of their steps, so that those up to a step are the first ones of
    the file. A resumed run drops the rows after its newest checkpoint, and may repeat their steps with other values.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode: int | None = None
        self._offset = 0
        self._num_lasting = 0
        self._newest_checkpoint = -1
        self._waiting: deque[dict[str, Any]] = deque()

    def read(self) -> list[LastingRow]:
        """The rows that have become lasting since the last call.

        Raises:
            OSError: the file cannot be read.
            ReplacedError: a resumed run has written it anew.
        """
        with self._path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            if self._inode not in (None, inode):
                raise ReplacedError
            self._inode = inode
            file.seek(self._offset)
            text = file.read()
        complete = text[: text.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.splitlines():
            self._take(parse_row(line))
        rows = []
        while self._waiting and self._waiting[0]["step"] <= self._newest_checkpoint:
            self._num_lasting += 1
            rows.append(LastingRow(self._num_lasting, self._waiting.popleft()))
        return rows

    def _take(self, row: dict[str, Any] | None) -> None:
        if row is not None and row["kind"] in ("train", "evaluation"):
            self._waiting.append(row)
        elif row is not None and row["kind"] == "checkpoint":
            self._newest_checkpoint = max(self._newest_checkpoint, row["step"])
