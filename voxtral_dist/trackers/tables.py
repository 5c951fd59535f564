"""Tables of evaluated utterances, with the audio of a few where it is small."""

from __future__ import annotations

import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from voxtral_dist.config import RunConfig, load_config
from voxtral_dist.data.stored.index import read_index
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.errors import UserError
from voxtral_dist.text.json_text import parse_json
from voxtral_dist.trackers.tracker import Table

# Those with the most errors come first.
MAX_ROWS = 200
MAX_CLIPS = 8
MAX_CLIP_BYTES = 1_000_000
COLUMNS = (
    "key",
    "language",
    "duration_seconds",
    "reference",
    "hypothesis",
    "word_errors",
    "word_reference_length",
    "hit_limit",
    "has_repetition_loop",
)
_ERRORS = ("word_substitutions", "word_deletions", "word_insertions")


def evaluation_table(run_dir: Path, step: int, name: str, folder: Path) -> Table | None:
    """The utterances of a test set at a step; None where their file is gone.

    Args:
        run_dir: of the run.
        step: of the evaluation.
        name: of the test set.
        folder: where files of audio are put.

    Raises:
        ValueError: a line of the file is damaged.
    """
    path = run_dir / "evaluations" / f"step-{step:07d}" / f"{name}.jsonl"
    if not path.is_file():
        return None
    lines: list[dict[str, Any]] = [parse_json(line) for line in path.read_bytes().splitlines()]
    shown = sorted(({**line, "word_errors": sum(line[key] for key in _ERRORS)} for line in lines), key=_most_errors)
    shown = shown[:MAX_ROWS]
    rows = [[line.get(column) for column in COLUMNS] for line in shown]
    return Table(COLUMNS, rows, _audio(run_dir, name, shown[:MAX_CLIPS], folder))


def _most_errors(line: Mapping[str, Any]) -> tuple[int, int]:
    return -line["word_errors"], line["utterance_id"]


def _audio(run_dir: Path, name: str, lines: Sequence[Mapping[str, Any]], folder: Path) -> dict[int, Path]:
    """Files of the audio of lines, by their number; shards that have moved have none."""
    found: dict[int, Path] = {}
    try:
        config: RunConfig = load_config(run_dir / "config.yaml")
        test_set = config.evaluation.test_sets.get(name)
        if test_set is None:
            return {}
        storage = Storage(config.storage)
        index = read_index([test_set.shards], storage)
        for number, line in enumerate(lines):
            stored = index.parse(line["utterance_id"], storage.read(index.span(line["utterance_id"])))
            if stored.key == line["key"] and len(stored.audio) <= MAX_CLIP_BYTES:
                folder.mkdir(parents=True, exist_ok=True)
                found[number] = folder / f"{number:03d}.{stored.audio_suffix}"
                found[number].write_bytes(stored.audio)
    except (UserError, OSError, ValueError, IndexError, tarfile.TarError):
        return found
    return found
