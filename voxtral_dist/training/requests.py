"""What ranks ask for after a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Requests:
    """What a rank asks for after a step; all ranks do what one of them asks for.

    stop: to stop, because a signal asked it. stop_in_time: to stop, because `max_run_hours` are nearly over. save: to
    save, and to wait for it. save_in_background: to save by `every_seconds`. cannot_read: to stop, because the storage
    of the next step's utterances fails. is_written: to complete the checkpoint under way; this is done when all ranks
    ask for it.
    """

    stop: bool = False
    stop_in_time: bool = False
    save: bool = False
    save_in_background: bool = False
    cannot_read: bool = False
    is_written: bool = False

    def row(self) -> list[float]:
        """The requests as numbers."""
        return [float(one) for one in astuple(self)]

    @classmethod
    def over_ranks(cls, rows: Sequence[Sequence[float]]) -> Requests:
        """What all ranks do, from the row of each."""
        stop, stop_in_time, save, save_in_background, cannot_read, is_written = zip(*rows, strict=True)
        return cls(any(stop), any(stop_in_time), any(save), any(save_in_background), any(cannot_read), all(is_written))
