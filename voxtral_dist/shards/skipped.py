"""`skipped.jsonl`, the file that lists what was in a corpus but is not in its shard set."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from voxtral_dist.output.masking import masked
from voxtral_dist.shards.corpus.utterances import Refusal
from voxtral_dist.text.json_text import parse_json

SKIPPED_FILE = "skipped.jsonl"
_NUM_NAMED = 10


@dataclass(frozen=True)
class Skipped:
    """Number of skipped utterances by cause, and the reasons of the first ones."""

    causes: Mapping[str, int] = field(default_factory=dict)
    first_reasons: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Number over all causes."""
        return sum(self.causes.values())


def write_refusal(file: BinaryIO, refusal: Refusal) -> None:
    """Append one refusal as a line."""
    row = {"place": refusal.place, "key": refusal.key, "cause": refusal.cause, "reason": refusal.message}
    # File names need not be Unicode: JSON escapes such bytes.
    file.write(masked(json.dumps(row, ensure_ascii=False)).encode("utf-8", "backslashreplace") + b"\n")


def read_skipped(path: Path) -> Skipped:
    """What the file lists; nothing if it does not exist."""
    causes: Counter[str] = Counter()
    reasons: list[str] = []
    if path.exists():
        with path.open("rb") as lines:
            for line in lines:
                try:
                    row = parse_json(line)
                    cause, reason = str(row["cause"]), f"{row['place']}: {row['reason']}"
                except (ValueError, KeyError, TypeError):
                    cause, reason = "damaged line", f"a line of {path.name} is damaged"
                causes[cause] += 1
                if len(reasons) < _NUM_NAMED:
                    reasons.append(reason.encode("utf-8", "backslashreplace").decode("utf-8"))
    return Skipped(causes, tuple(reasons))
