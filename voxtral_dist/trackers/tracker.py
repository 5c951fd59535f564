"""What a tracker is given, and what it has to do with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

PROJECT = "voxtral-dist"
FOLDER = "trackers"
TITLES = {"wandb": "Weights & Biases", "mlflow": "MLflow", "trackio": "Trackio"}


@dataclass(frozen=True)
class Table:
    """Evaluated utterances: cells by row, and files with the audio of some rows."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    audio: Mapping[int, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class TrackedRow:
    """A row of `metrics.jsonl` for trackers.

    number: among the rows that are sent, from 1. time: when it was measured, in milliseconds since 1970. scalars: by
    name. table: of an evaluation, with its name.
    """

    number: int
    step: int
    time: int
    scalars: Mapping[str, float]
    table: tuple[str, Table] | None = None


class Tracker(Protocol):
    """A service that shows runs. Any of its methods may raise anything, and is then tried again with a new one."""

    def open(self, run_id: str | None, name: str, folder: Path, config: Mapping[str, Any]) -> str:
        """Begin a run, or continue that of an id. Returns its id.

        Args:
            run_id: None for a new run.
            name: of the run.
            folder: where the service may keep files.
            config: the run's configuration, without secrets.
        """

    def send(self, rows: Sequence[TrackedRow]) -> None:
        """Send rows, in order. Those that have arrived before, with the same number and time, change nothing."""

    def send_files(self, files: Mapping[str, Path]) -> None:
        """Send the report and the like, by name. Each finished run does it once."""

    def close(self, *, is_finished: bool) -> None:
        """Wait until everything has arrived; an unfinished run is continued later."""


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by names with dots."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
