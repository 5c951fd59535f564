"""Trackio: its local store, or the Space or server that its variables name."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from voxtral_dist.trackers.tracker import PROJECT, Table, TrackedRow


class TrackioTracker:
    """A run of Trackio, which is opened for each sending: only its end waits until what was sent is stored."""

    def __init__(self) -> None:
        self._name = ""
        self._config: Mapping[str, Any] = {}

    def open(self, run_id: str | None, name: str, folder: Path, config: Mapping[str, Any]) -> str:
        """See `Tracker.open`. The id is the name, which has to be another one for each run of a project."""
        self._name = run_id or f"{name}-{uuid.uuid4().hex[:6]}"
        self._config = config
        self._begin().finish()
        return self._name

    def send(self, rows: Sequence[TrackedRow]) -> None:
        """See `Tracker.send`."""
        run = self._begin()
        for row in rows:
            values: dict[str, Any] = dict(row.scalars)
            if row.table is not None:
                name, table = row.table
                values[name] = _trackio_table(table)
            run.log(values, step=row.step)
        run.finish()

    def send_files(self, files: Mapping[str, Path]) -> None:
        """See `Tracker.send_files`."""
        import trackio

        artifact = trackio.Artifact(f"report-{self._name}", type="report")
        for name, path in files.items():
            artifact.add_file(str(path), name=name)
        run = self._begin()
        run.log_artifact(artifact)
        run.finish()

    def close(self, *, is_finished: bool) -> None:
        """See `Tracker.close`."""

    def _begin(self) -> Any:
        import trackio

        return trackio.init(
            os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=self._name,
            config=dict(self._config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )


def _trackio_table(table: Table) -> Any:
    import trackio

    columns, rows = list(table.columns), [list(row) for row in table.rows]
    if table.audio:
        columns.append("audio")
        for number, row in enumerate(rows):
            row.append(trackio.Audio(str(table.audio[number])) if number in table.audio else None)
    return trackio.Table(columns=columns, data=rows)
