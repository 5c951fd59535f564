"""When checkpoints are saved, in the background where memory allows, and how long training stood still for them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch

from voxtral_dist.checkpoints.directory import CheckpointDirectory
from voxtral_dist.checkpoints.files import held_bytes
from voxtral_dist.checkpoints.progress import TrainProgress
from voxtral_dist.checkpoints.uploads import CheckpointUploads
from voxtral_dist.config import CheckpointConfig
from voxtral_dist.distributed.collectives import computed_on_first, max_over_ranks
from voxtral_dist.distributed.data_workers import is_loss_of_worker
from voxtral_dist.distributed.devices import free_memory_bytes
from voxtral_dist.distributed.standing import advance, stand
from voxtral_dist.distributed.world import World, ranks_on_node
from voxtral_dist.engine.engine import Engine
from voxtral_dist.errors import LostPeerError
from voxtral_dist.training.metrics_log import MetricsLog
from voxtral_dist.training.requests import Requests
from voxtral_dist.training.time_limit import Part, TimeLimit

# Part of a rank's free host memory that a copy of its state may take.
_MAX_FRACTION = 0.5

log = logging.getLogger(__name__)


class Saver:
    """Saves the state of a run. All ranks call its methods together, unless a method says otherwise."""

    def __init__(
        self,
        settings: CheckpointConfig,
        checkpoints: CheckpointDirectory,
        engine: Engine,
        metrics_log: MetricsLog,
        time_limit: TimeLimit,
        world: World,
        clock: Callable[[], float] = time.monotonic,
        uploads: CheckpointUploads | None = None,
    ) -> None:
        """Start the clock of `every_seconds`. Rank 0 may have `uploads`, which take each complete checkpoint."""
        self._uploads = uploads if world.is_first else None
        if self._uploads is not None:
            checkpoints.steps_in_use = self._uploads.steps_in_use
        self._settings = settings
        self._checkpoints = checkpoints
        self._engine = engine
        self._metrics_log = metrics_log
        self._time_limit = time_limit
        self._world = world
        self._clock = clock
        # When the last save began, at which step, and how long training has stood still for it.
        self._began = clock()
        self._step = 0
        self._stalled_seconds = 0.0

    def is_time(self) -> bool:
        """Whether rank 0 asks for a checkpoint, by `every_seconds`; it alone is asked."""
        every, is_first = self._settings.every_seconds, self._world.is_first
        return every is not None and is_first and self._clock() - self._began >= every

    def is_written(self) -> bool:
        """Whether this rank has written its part of the checkpoint under way; each rank for itself."""
        return self._checkpoints.is_written

    def after_step(self, progress: TrainProgress, agreed: Requests, *, is_awaited: bool) -> None:
        """Complete and begin what is due after an update.

        Args:
            progress: after the update.
            agreed: what all ranks agreed on.
            is_awaited: whether a checkpoint must be complete before the run goes on.

        Raises:
            SharedWriteError: a checkpoint cannot be written.
        """
        self._record_uploads()
        if agreed.is_written:
            self.complete()
        if is_awaited or agreed.save:
            self.save(progress)
        elif agreed.save_in_background or progress.step % self._settings.every_steps == 0:
            self.save_in_background(progress)

    def save(self, progress: TrainProgress) -> None:
        """Save, and wait until the checkpoint is complete.

        Raises:
            SharedWriteError: it cannot be written.
        """
        self.complete()
        stand("save", progress.step)
        self._began, self._step = self._clock(), progress.step
        with self._time_limit.measuring("save"):
            saved = self._checkpoints.save(self._engine, progress)
        seconds = self._time_limit.last("save")
        self._record(saved, seconds, seconds)

    def save_in_background(self, progress: TrainProgress) -> None:
        """Copy the state, and let a thread write it; wait for both where memory does not allow that.

        Raises:
            SharedWriteError: it, or the one before, cannot be written.
        """
        self.complete()
        if not self._has_memory():
            self.save(progress)
            return
        stand("save", progress.step)
        self._began, self._step = self._clock(), progress.step
        self._checkpoints.start(self._engine, progress, in_background=True)
        self._stalled_seconds = self._clock() - self._began

    def complete(self) -> None:
        """Complete the checkpoint under way, if there is one, as soon as all ranks have written their parts.

        Raises:
            SharedWriteError: it cannot be written.
        """
        if not self._checkpoints.is_under_way:
            return
        stand("save", self._step)
        started = self._clock()
        saved = self._checkpoints.finish()
        ended = self._clock()
        self._time_limit.record("save", ended - self._began)
        self._record(saved, ended - self._began, self._stalled_seconds + ended - started)

    def owed_uploads(self) -> tuple[Part, ...]:
        """What a stop would wait for after its save: its upload, and one that is under way; rank 0 alone knows."""
        if self._uploads is None:
            return ()
        return ("upload", "upload") if self._uploads.steps_in_use() else ("upload",)

    def finish_uploads(self) -> None:
        """Wait until the newest checkpoint is uploaded, or one more attempt has failed."""
        if self._settings.upload is None:
            return
        uploads = self._uploads
        computed_on_first(lambda: None if uploads is None else uploads.finish(advance), self._world)
        self._record_uploads()

    def newest(self) -> str | None:
        """The name of the newest checkpoint, after the one under way was completed; None if there is none."""
        self.complete()
        return self._checkpoints.newest()

    def outlast(self, _type: object, error: BaseException | None, _trace: object) -> None:
        """Wait for the checkpoint under way, at the end of a context that an error of this rank alone may end.

        Not after errors of collectives: a rank that is gone would be waited for.
        """
        is_of_others = isinstance(error, LostPeerError) or (
            isinstance(error, RuntimeError)
            and not isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError)
            and not is_loss_of_worker(error)
        )
        if not isinstance(error, Exception) or is_of_others or not self._checkpoints.is_under_way:
            return
        stand("save", self._step)
        # The other ranks wait in a collective.
        saved = self._checkpoints.outlasted(self._world.timeout.total_seconds() / 2)
        if saved is not None:
            log.warning("The checkpoint %s, which was under way, is complete.", saved)

    def _has_memory(self) -> bool:
        """Whether all ranks have the memory for a copy, or the configuration says that they have."""
        if self._settings.asynchronous is not None:
            return self._settings.asynchronous
        free = free_memory_bytes(torch.device("cpu"), ranks_on_node(self._world.size))
        needed = held_bytes(self._engine, self._world) - self._checkpoints.buffer_bytes
        is_short = needed > _MAX_FRACTION * free
        return not max_over_ranks([int(is_short)], self._world)[0]

    def _record(self, saved: Path, seconds: float, stalled_seconds: float) -> None:
        values = {"path": saved.name, "seconds": round(seconds, 3), "stalled_seconds": round(stalled_seconds, 3)}
        self._metrics_log.write("checkpoint", self._step, values)
        if self._uploads is not None:
            self._uploads.offer(self._step, saved, self._checkpoints.kept_step)

    def _record_uploads(self) -> None:
        for event in [] if self._uploads is None else self._uploads.events():
            self._metrics_log.write("event", event.step, event.values)
            if event.values["event"] == "uploaded":
                self._time_limit.record("upload", event.values["seconds"])
            if event.sentence is not None:
                self._metrics_log.say(event.sentence)
