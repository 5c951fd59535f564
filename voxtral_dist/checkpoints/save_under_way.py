"""A checkpoint that was begun and is not complete."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread

from voxtral_dist.checkpoints.files import HeldStates, WrittenPart
from voxtral_dist.checkpoints.progress import TrainProgress
from voxtral_dist.checkpoints.written_parts import WrittenParts
from voxtral_dist.distributed.world import World
from voxtral_dist.errors import first_line


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
        self._parts: WrittenParts | None = None
        self._failure: str | None = None
        self._error: BaseException | None = None

    def write_in_background(self, world: World, complete: Callable[[Sequence[WrittenPart]], str | None]) -> None:
        """Start the thread, on all ranks together. It is a daemon: an error elsewhere must not wait for the disk.

        Args:
            world: all ranks.
            complete: completes the checkpoint from the parts of all ranks, in the thread of rank 0; why it cannot.
        """
        self._parts = WrittenParts(world)
        self._thread = Thread(target=self._write, args=(world, complete), name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_in_background(self) -> bool:
        """Whether a thread writes it."""
        return self._thread is not None

    @property
    def is_written(self) -> bool:
        """Whether the thread has ended: this rank's part is written, and on rank 0 the checkpoint complete."""
        return self._thread is not None and not self._thread.is_alive()

    def wait(self) -> str | None:
        """Wait for the thread. On rank 0: why the checkpoint cannot be completed; None if it is complete."""
        assert self._thread is not None, "it is written in the background"
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._failure

    def is_complete_within(self, seconds: float) -> bool:
        """Whether the checkpoint is complete within a time, whatever the other ranks' main threads do."""
        return self._parts is not None and self._parts.are_complete(seconds)

    def _write(self, world: World, complete: Callable[[Sequence[WrittenPart]], str | None]) -> None:
        assert self._parts is not None
        try:
            self._parts.tell(self._written())
            if world.is_first:
                self._failure = complete(self._parts.gather())
                self._parts.end(self._failure)
        except BaseException as error:
            self._error = error
            # The store may be gone too.
            with suppress(RuntimeError):
                self._parts.end(_described(error))

    def _written(self) -> WrittenPart:
        """This rank's part; with its failure where an error ends the writing, so that nobody waits for it."""
        try:
            return self.held.write()
        except BaseException as error:
            self._error = error
            return WrittenPart(failure=_described(error))


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
