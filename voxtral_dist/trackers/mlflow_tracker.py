"""MLflow: the store of `MLFLOW_TRACKING_URI`, in the experiment of `MLFLOW_EXPERIMENT_NAME`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from voxtral_dist.trackers.tracker import PROJECT, TrackedRow, flat

# Of one request, as MLflow's REST API takes them.
_MOST_METRICS = 1000
_MOST_PARAMETERS = 100
_LONGEST_PARAMETER = 6000
_LONGEST_TAG = 5000
_NOT_IN_NAMES = re.compile(r"[^\w. :/-]")


class MlflowTracker:
    """A run of MLflow. Its stores keep a metric once that comes twice with the same step, value and time."""

    def __init__(self) -> None:
        self._client: Any = None
        self._run_id = ""

    def open(self, run_id: str | None, name: str, folder: Path, config: Mapping[str, Any]) -> str:
        """See `Tracker.open`."""
        from mlflow import MlflowClient

        self._client = MlflowClient()
        if run_id is None:
            run_id = self._client.create_run(self._experiment(), run_name=name).info.run_id
        self._run_id = str(run_id)
        self._client.update_run(self._run_id, status="RUNNING")
        self._send_parameters(config)
        return self._run_id

    def send(self, rows: Sequence[TrackedRow]) -> None:
        """See `Tracker.send`."""
        from mlflow.entities import Metric

        metrics = [
            Metric(_NOT_IN_NAMES.sub("_", name), float(value), row.time, row.step)
            for row in rows
            for name, value in row.scalars.items()
        ]
        for some in _batched(metrics, _MOST_METRICS):
            self._client.log_batch(self._run_id, metrics=some)
        for row in rows:
            if row.table is not None:
                self._send_table(row)

    def _send_table(self, row: TrackedRow) -> None:
        assert row.table is not None
        name, table = row.table
        target = f"{name}/step-{row.step:07d}"
        rows = [list(cells) for cells in table.rows]
        columns = list(table.columns)
        if table.audio:
            columns.append("audio")
            for number, cells in enumerate(rows):
                path = table.audio.get(number)
                cells.append(path and f"{target}/{path.name}")
                if path is not None:
                    self._client.log_artifact(self._run_id, str(path), target)
        # As `mlflow.log_table` writes it, and `mlflow.load_table` reads it.
        self._client.log_dict(self._run_id, {"columns": columns, "data": rows}, f"{target}/utterances.json")

    def send_files(self, files: Mapping[str, Path]) -> None:
        """See `Tracker.send_files`."""
        for name, path in files.items():
            self._client.log_artifact(self._run_id, str(path), str(Path("report") / Path(name).parent))

    def close(self, *, is_finished: bool) -> None:
        """See `Tracker.close`."""
        if self._run_id:
            self._client.set_terminated(self._run_id, "FINISHED" if is_finished else "KILLED")

    def _experiment(self) -> str:
        if (given := os.environ.get("MLFLOW_EXPERIMENT_ID")) is not None:
            return given
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        return str(self._client.create_experiment(name) if found is None else found.experiment_id)

    def _send_parameters(self, config: Mapping[str, Any]) -> None:
        """Send the settings. A parameter cannot change, so that those of a resumed run become tags."""
        from mlflow.entities import Param, RunTag

        given = {_NOT_IN_NAMES.sub("_", name): str(value)[:_LONGEST_PARAMETER] for name, value in flat(config).items()}
        known = self._client.get_run(self._run_id).data.params
        new = [Param(name, value) for name, value in given.items() if name not in known]
        changed = {name: value for name, value in given.items() if known.get(name, value) != value}
        for some in _batched(new, _MOST_PARAMETERS):
            self._client.log_batch(self._run_id, params=some)
        tags = [RunTag(f"changed.{name}", value[:_LONGEST_TAG]) for name, value in changed.items()]
        for some in _batched(tags, _MOST_PARAMETERS):
            self._client.log_batch(self._run_id, tags=some)


def _batched(values: Sequence[Any], size: int) -> list[list[Any]]:
    return [list(values[start : start + size]) for start in range(0, len(values), size)]
