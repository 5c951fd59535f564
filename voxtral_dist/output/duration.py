"""Durations as they are printed."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """A duration such as `3 h 20 min`, `45 min`, `42 s` or `3.1 s`."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
