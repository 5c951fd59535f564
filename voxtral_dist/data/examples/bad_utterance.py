"""Utterances that cannot be used."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass

from voxtral_dist.data.stored.checks import UnusableError
from voxtral_dist.errors import first_line


@dataclass(frozen=True)
class BadUtterance:
    """An utterance that cannot be used.

    shard: name of the tar that holds it.
    key: its WebDataset key.
    reason: a predicate, such as "is silent".
    is_too_long: whether it exceeds `max_target_tokens` or the positions of the model.
    """

    shard: str
    key: str
    reason: str
    is_too_long: bool = False


def described(error: Exception) -> str:
    """What is wrong with an utterance: the message of an error that its checks expect, or the type of any other."""
    if isinstance(error, UnusableError | ValueError | OSError | tarfile.TarError):
        return str(error)
    return f"cannot be used ({type(error).__name__}: {first_line(error)})"


class UtteranceError(Exception):
    """Carries a `BadUtterance` from where it is found to where it is counted."""

    def __init__(self, bad: BadUtterance) -> None:
        super().__init__(f"utterance {bad.key!r} of {bad.shard} {bad.reason}")
        self.bad = bad
