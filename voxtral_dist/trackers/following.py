"""A process beside rank 0 that tells one tracker what is in `metrics.jsonl`, at the tracker's own pace."""

from __future__ import annotations

import fcntl
import json
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from voxtral_dist.config import TrackerKind
from voxtral_dist.files import write_atomically
from voxtral_dist.output.masking import masked
from voxtral_dist.text.json_text import parse_json
from voxtral_dist.trackers.lasting_rows import LastingRow, LastingRows, ReplacedError
from voxtral_dist.trackers.mlflow_tracker import MlflowTracker
from voxtral_dist.trackers.tables import evaluation_table
from voxtral_dist.trackers.tracker import FOLDER, TITLES, TrackedRow, Tracker
from voxtral_dist.trackers.trackio_tracker import TrackioTracker
from voxtral_dist.trackers.wandb_tracker import WandbTracker
from voxtral_dist.training.metrics_file import scalars_of

_TRACKERS: Mapping[TrackerKind, Callable[[], Tracker]] = {
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
    "trackio": TrackioTracker,
}
_POLL_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0
_ROWS_AT_ONCE = 500
# Of a finished run, in its folder, by the names that trackers show.
_REPORT_FILES = {
    "report.html": "report.html",
    "report.md": "report.md",
    "summary.json": "summary.json",
    "config.yaml": "config.yaml",
    "model-card.md": "export/README.md",
}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sent:
    """What a tracker has got so far, stored in `run_dir/trackers/KIND.json`.

    run_id: of the tracker. num_rows: of kind `train` and `evaluation`. digest: of the last one. time: of the last one,
    in milliseconds since 1970. sending: the number of rows after a sending that was begun, and its time; if it was
    interrupted, the same rows are sent with the same times. has_report: whether the report of the finished run was
    sent.
    """

    run_id: str | None = None
    num_rows: int = 0
    digest: str = ""
    time: int = 0
    sending: tuple[int, int] | None = None
    has_report: bool = False


class Follower:
    """Sends to one tracker what `metrics.jsonl` has and the tracker has not."""

    def __init__(self, run_dir: Path, kind: TrackerKind, say: Callable[[str], None]) -> None:
        self._run_dir = run_dir
        self._kind = kind
        self._say = say
        self._folder = run_dir / FOLDER
        self._rows = LastingRows(run_dir / "metrics.jsonl")
        self._unsent: list[LastingRow] = []
        self._tracker: Tracker | None = None
        self._failure = ""
        self._is_compared = False
        self._sent = Sent()

    def follow(self, wait: Callable[[float], bool]) -> bool:
        """Send until `wait`, which takes seconds, says that the run has ended, and then what is left.

        Returns:
            Whether everything was sent.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"{self._kind}.lock").open("w") as lock:
            # An earlier process of the run may still be sending.
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._sent = self._read_sent()
            pause, has_ended = 0.0, False
            while not has_ended:
                has_ended = wait(pause)
                try:
                    is_done = self._try(is_last=has_ended)
                except ReplacedError:
                    return True
                pause = _POLL_SECONDS if is_done else min(_LONGEST_PAUSE_SECONDS, 2 * max(pause, _POLL_SECONDS))
            return is_done

    def _try(self, *, is_last: bool) -> bool:
        try:
            self._send(is_last=is_last)
        except ReplacedError:
            raise
        # Trackers and their stores raise all kinds of errors, of which none may matter to the run.
        except Exception as error:
            logger.exception("%s", TITLES[self._kind])
            failure = f"{type(error).__name__}: {error}".partition("\n")[0]
            if failure != self._failure:
                self._say(
                    f"{TITLES[self._kind]} takes nothing at present ({failure}): it is tried again, and training goes "
                    f"on; see {self._folder / self._kind}.log"
                )
            self._failure, self._tracker = failure, None
            return False
        if self._failure:
            self._say(f"{TITLES[self._kind]} works again.")
        self._failure = ""
        return True

    def _send(self, *, is_last: bool) -> None:
        self._unsent += self._rows.read()
        if not self._is_compared:
            self._compare()
        tracker = self._tracker or self._open()
        while self._unsent:
            end, now = self._sent.sending or (0, int(time.time() * 1000))
            some = self._unsent[: end - self._sent.num_rows if end else _ROWS_AT_ONCE]
            # Some stores know by the times that rows have come before.
            self._store(sending=(some[-1].number, now))
            with tempfile.TemporaryDirectory() as folder:
                tracker.send(self._tracked(some, now, Path(folder)))
            self._store(num_rows=some[-1].number, digest=some[-1].digest, time=now, sending=None)
            del self._unsent[: len(some)]
        is_finished = (self._run_dir / "summary.json").is_file()
        if is_last:
            if is_finished and not self._sent.has_report:
                paths = {name: self._run_dir / path for name, path in _REPORT_FILES.items()}
                tracker.send_files({name: path for name, path in paths.items() if path.is_file()})
            tracker.close(is_finished=is_finished)
            self._store(has_report=is_finished)

    def _compare(self) -> None:
        """Take away what was sent already; begin anew where the file does not continue what was sent."""
        num_rows = self._sent.num_rows
        if num_rows:
            last = self._unsent[num_rows - 1] if num_rows <= len(self._unsent) else None
            if last is None or last.digest != self._sent.digest:
                self._say(
                    f"{TITLES[self._kind]}: the run goes on from before what was sent, so it becomes a new run there; "
                    f"the earlier one is {self._sent.run_id}."
                )
                self._sent = Sent()
            else:
                del self._unsent[:num_rows]
        self._is_compared = True

    def _open(self) -> Tracker:
        tracker = _TRACKERS[self._kind]()
        name = self._run_dir.resolve().name
        run_id = tracker.open(self._sent.run_id, name, self._folder, _config(self._run_dir))
        self._store(run_id=run_id)
        self._tracker = tracker
        return tracker

    def _tracked(self, rows: Sequence[LastingRow], now: int, folder: Path) -> list[TrackedRow]:
        """Rows for trackers, with times as far apart as the rows' durations, but none before what was sent already."""
        tracked: list[TrackedRow] = []
        for one in reversed(rows):
            row, table = one.row, None
            if row["kind"] == "evaluation":
                found = evaluation_table(self._run_dir, row["step"], row["name"], folder / str(one.number))
                table = found and (f"evaluation/{row['name']}/utterances", found)
            moment = max(now, self._sent.time)
            tracked.append(TrackedRow(one.number, row["step"], moment, scalars_of(row), table or None))
            now -= int(1000 * (row.get("step_seconds") or row.get("seconds") or 0))
        return tracked[::-1]

    def _read_sent(self) -> Sent:
        path = self._folder / f"{self._kind}.json"
        return Sent(**parse_json(path.read_bytes())) if path.is_file() else Sent()

    def _store(self, **changes: Any) -> None:
        self._sent = replace(self._sent, **changes)
        write_atomically(self._folder / f"{self._kind}.json", json.dumps(asdict(self._sent)) + "\n")


def _config(run_dir: Path) -> dict[str, Any]:
    """The configuration of a run, without secrets."""
    config = yaml.safe_load((run_dir / "config.yaml").read_bytes())
    found: dict[str, Any] = json.loads(masked(json.dumps(config, default=str)))
    return found
