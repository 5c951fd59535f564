"""Weights & Biases, online or offline (`WANDB_MODE=offline`)."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from voxtral_dist.trackers.tracker import PROJECT, Table, TrackedRow


class WandbTracker:
    """A run of Weights & Biases. Its own step is the number of the row, because it takes each one once and in order."""

    def __init__(self) -> None:
        self._run: Any = None

    def open(self, run_id: str | None, name: str, folder: Path, config: Mapping[str, Any]) -> str:
        """See `Tracker.open`."""
        import wandb

        run_id = run_id or uuid.uuid4().hex[:8]
        self._run = wandb.init(
            project=None if "WANDB_PROJECT" in os.environ else PROJECT,
            name=None if "WANDB_NAME" in os.environ else name,
            id=run_id,
            resume="allow",
            dir=None if "WANDB_DIR" in os.environ else str(folder),
            settings=wandb.Settings(console="off"),
        )
        self._run.config.update(dict(config), allow_val_change=True)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        return run_id

    def send(self, rows: Sequence[TrackedRow]) -> None:
        """See `Tracker.send`."""
        for row in rows:
            values: dict[str, Any] = {"step": row.step, **row.scalars}
            if row.table is not None:
                name, table = row.table
                values[name] = _wandb_table(table)
            self._run.log(values, step=row.number)

    def send_files(self, files: Mapping[str, Path]) -> None:
        """See `Tracker.send_files`."""
        import wandb

        artifact = wandb.Artifact(f"report-{self._run.id}", type="report")
        for name, path in files.items():
            artifact.add_file(str(path), name=name)
        self._run.log_artifact(artifact)

    def close(self, *, is_finished: bool) -> None:
        """See `Tracker.close`."""
        if self._run is not None:
            # Another exit code would show the run as crashed; it is continued where it is not finished.
            self._run.finish(exit_code=0)


def _wandb_table(table: Table) -> Any:
    import wandb

    columns, rows = list(table.columns), [list(row) for row in table.rows]
    if table.audio:
        columns.append("audio")
        for number, row in enumerate(rows):
            row.append(wandb.Audio(str(table.audio[number])) if number in table.audio else None)
    # Cells of a column may be null, and be fractions in one row and whole numbers in another.
    return wandb.Table(columns=columns, data=rows, allow_mixed_types=True)
