"""Warnings of audio that ends before its file says it does: its text may be longer than what is heard."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)

_NUM_NAMED = 10


class CutAudio:
    """Names the first files that are cut off, and counts the others."""

    def __init__(self) -> None:
        self._count = 0

    def add(self, sentence: str | None) -> None:
        """Log what is known of a file; None if it is complete."""
        if sentence is None:
            return
        self._count += 1
        if self._count <= _NUM_NAMED:
            log.warning("%s", sentence)

    def log_rest(self) -> None:
        """Log how many files were not named."""
        if self._count > _NUM_NAMED:
            log.warning("%d more audio files end before they say they do.", self._count - _NUM_NAMED)
