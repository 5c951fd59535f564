"""Uploads of checkpoints by a thread of rank 0, which training never waits for before its end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from voxtral_dist.checkpoints.remote import RemoteCheckpoints
from voxtral_dist.config import RunConfig
from voxtral_dist.errors import UserError
from voxtral_dist.output.masking import masked

# Pauses between attempts grow from the first to the second.
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 10.0, 300.0


@dataclass(frozen=True)
class UploadEvent:
    """Something that the run's record and its user should know.

    step: of the checkpoint. values: of the row. sentence: to be said; None where it was expected.
    """

    step: int
    values: dict[str, Any]
    sentence: str | None


@dataclass(frozen=True)
class _Job:
    step: int
    folder: Path
    kept_step: int | None


@dataclass
class CheckpointUploads:
    """Uploads the newest complete checkpoint; one that is followed by a newer one before its turn is skipped.

    remote: where to. run_dir: of metrics and results. keep: checkpoints to keep there.
    """

    remote: RemoteCheckpoints
    run_dir: Path
    keep: int
    clock: Callable[[], float] = time.monotonic
    _state: threading.Condition = field(default_factory=threading.Condition, init=False)
    _waiting: _Job | None = field(default=None, init=False)
    _current: _Job | None = field(default=None, init=False)
    _is_failing: bool = field(default=False, init=False)
    _num_attempts: int = field(default=0, init=False)
    _events: list[UploadEvent] = field(default_factory=list, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)

    def offer(self, step: int, folder: Path, kept_step: int | None) -> None:
        """Upload a complete checkpoint soon.

        Args:
            step: of the checkpoint.
            folder: its files.
            kept_step: of the best one, which is kept.
        """
        with self._state:
            self._waiting = _Job(step, folder, kept_step)
            if self._thread is None:
                # A daemon: an error elsewhere must not wait for the store.
                self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
                self._thread.start()
            self._state.notify_all()

    def steps_in_use(self) -> Collection[int]:
        """Steps of the checkpoints that are or will be uploaded, and must not be removed meanwhile."""
        with self._state:
            return {job.step for job in (self._waiting, self._current) if job is not None}

    def events(self) -> list[UploadEvent]:
        """What has happened since the last call."""
        with self._state:
            found, self._events = self._events, []
            return found

    def finish(self, advance: Callable[[], None]) -> None:
        """Wait until the newest checkpoint is uploaded, or one more attempt has failed.

        Args:
            advance: called about once a second.
        """
        with self._state:
            before = self._num_attempts
            # A thread that pauses after a failure tries again at once.
            self._state.notify_all()
            while self._waiting is not None or self._current is not None:
                if self._is_failing and self._num_attempts > before:
                    self._give_up()
                    return
                self._state.wait(1.0)
                advance()

    def _give_up(self) -> None:
        job = self._waiting or self._current
        assert job is not None, "something is to be uploaded"
        sentence = f"The checkpoint {job.folder.name} is in `run_dir` only, and not at {masked(self.remote.url)}."
        self._events.append(UploadEvent(job.step, {"event": "not_uploaded", "sentence": sentence}, sentence))

    def _work(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while True:
            with self._state:
                while self._waiting is None and self._current is None:
                    self._state.wait()
                if self._waiting is not None:
                    self._current, self._waiting = self._waiting, None
                job = self._current
                assert job is not None, "a thread waits for one"
            started = self.clock()
            reason = self._attempt(job)
            with self._state:
                self._num_attempts += 1
                if reason is None:
                    pause = _FIRST_PAUSE_SECONDS
                    self._succeed(job, self.clock() - started)
                else:
                    self._fail(job, reason)
                    self._state.notify_all()
                    self._state.wait(pause)
                    pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                self._state.notify_all()

    def _attempt(self, job: _Job) -> str | None:
        """Why a checkpoint could not be uploaded; None if it was."""
        try:
            self.remote.upload_records(self.run_dir)
            self.remote.upload(job.folder)
            self.remote.keep_only(
                self.keep, {step for step in (job.kept_step, *self.steps_in_use()) if step is not None}
            )
        except (OSError, UserError) as error:
            return str(error)
        except Exception as error:
            # Backends raise errors of their own; no upload may end the run.
            return f"{type(error).__name__}: {error}"
        return None

    def _succeed(self, job: _Job, seconds: float) -> None:
        sentence = None
        if self._is_failing:
            sentence = f"The checkpoint {job.folder.name} was uploaded to {masked(self.remote.url)}, which works again."
        self._is_failing, self._current = False, None
        values = {"event": "uploaded", "path": job.folder.name, "seconds": round(seconds, 3)}
        self._events.append(UploadEvent(job.step, values, sentence))

    def _fail(self, job: _Job, reason: str) -> None:
        if not self._is_failing:
            self._is_failing = True
            sentence = (
                f"The checkpoint {job.folder.name} cannot be uploaded to {masked(self.remote.url)}: {masked(reason)}. "
                "Training goes on, and it is tried again."
            )
            self._events.append(UploadEvent(job.step, {"event": "upload_failed", "sentence": sentence}, sentence))


def build_uploads(config: RunConfig) -> CheckpointUploads | None:
    """The uploads of a run; None if its configuration asks for none."""
    url = config.checkpoint.upload
    if url is None:
        return None
    # The thread itself tries again, with longer pauses.
    storage = config.storage.model_copy(update={"num_attempts": min(2, config.storage.num_attempts)})
    return CheckpointUploads(RemoteCheckpoints(url, storage), config.run_dir, config.checkpoint.keep)
