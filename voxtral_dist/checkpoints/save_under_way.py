"""A checkpoint that was begun and is not complete."""

from __future__ import annotations

from pathlib import Path
from threading import Thread

from voxtral_dist.checkpoints.files import HeldStates, WrittenPart
from voxtral_dist.checkpoints.progress import TrainProgress


class SaveUnderWay:
    """What a checkpoint will hold, and the thread that writes this rank's part, if one does."""

    def __init__(
        self,
        final: Path,
        temporary: Path,
        held: HeldStates,
        progress: TrainProgress,
        shapes: dict[str, tuple[int, ...]],
        scalars: dict[str, float],
    ) -> None:
        """Keep the state of a moment.

        Args:
            final: folder of the complete checkpoint.
            temporary: folder in which it is written.
            held: this rank's part.
            progress: of the run.
            shapes, scalars: of the engine.
        """
        self.final = final
        self.temporary = temporary
        self.held = held
        self.progress = progress
        self.shapes = shapes
        self.scalars = scalars
        self._thread: Thread | None = None
        self._outcome: WrittenPart | BaseException | None = None

    def write_in_background(self) -> None:
        """Start the thread. It is a daemon: an error elsewhere must not wait for the disk."""
        self._thread = Thread(target=self._write, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_written(self) -> bool:
        """Whether the thread has ended."""
        return self._outcome is not None

    def part(self) -> WrittenPart:
        """What this rank wrote, as soon as it has; without a thread it is written now."""
        if self._thread is None:
            return self.held.write()
        self._thread.join()
        match self._outcome:
            case WrittenPart() as part:
                return part
            case BaseException() as error:
                raise error
            case None:
                raise AssertionError("the thread has ended")

    def _write(self) -> None:
        try:
            self._outcome = self.held.write()
        except BaseException as error:
            self._outcome = error
