"""An utterance that cannot be used."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BadUtterance:
    """A sample that could not be used: where it is stored, and why.

    is_too_long: for the limit of target tokens, or for the positions of the model.
    """

    shard: str
    key: str
    reason: str
    is_too_long: bool = False


class UtteranceError(Exception):
    """Carries a `BadUtterance` from where it was found to where it is counted."""

    def __init__(self, bad: BadUtterance) -> None:
        super().__init__(f"sample {bad.key!r} of {bad.shard} {bad.reason}")
        self.bad = bad
